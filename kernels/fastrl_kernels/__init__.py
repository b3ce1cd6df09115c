"""Kernels for fastrl: Triton and thin callers of the CUDA extension."""

from pkgutil import extend_path

# The extension _C may have been built into another folder on the path (benchmarks/gpu.sh).
__path__ = extend_path(__path__, __name__)
