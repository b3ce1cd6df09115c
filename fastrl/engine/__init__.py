"""Batched generation: paged KV cache, continuous batching, seeds by request."""

from fastrl.engine.engine import Engine, StreamedToken

__all__ = ["Engine", "StreamedToken"]
