"""The figures and tables of the paper, under its own numbers."""
