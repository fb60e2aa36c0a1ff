"""The serving loop on a virtual clock: costs in the place of kernels."""
