"""The kernels in Triton: for GPUs, and on a CPU under Triton's interpreter."""
