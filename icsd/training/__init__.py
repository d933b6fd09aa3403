"""Training: configuration, the step, checkpoints and runs."""
