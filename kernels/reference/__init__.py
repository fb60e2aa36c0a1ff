"""Plain torch, slow and independent: what the other kernels are held against."""
