"""Thin callers of the compiled CUDA ops, one file per op."""
