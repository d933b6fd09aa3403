"""Benchmarks of the operator and of the training step, beside their peers; see benchmarks/README.md."""
