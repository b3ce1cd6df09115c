"""Thin callers of the package flash_attn, one file per op."""
