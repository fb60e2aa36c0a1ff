"""Triton kernels, their torch references and CPU twins. Knows torch, triton and numba only."""
