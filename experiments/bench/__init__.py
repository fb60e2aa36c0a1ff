"""Benchmarks of kernels and of the engine."""
