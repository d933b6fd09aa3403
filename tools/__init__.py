"""Scripts that generate figures and tables of the documentation."""
