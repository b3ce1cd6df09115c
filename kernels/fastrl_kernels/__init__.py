"""Kernels for fastrl: Triton and thin callers of the CUDA extension."""
