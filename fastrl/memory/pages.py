"""Sizes of the rollout that settings leave open: the engine takes them, a plan foresees them."""

from fastrl.config import EngineConfig
from fastrl.dense_attention import slots_read

PAGE_SIZE = 16
"""Tokens per page where sequences have many."""
MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""See EngineConfig.max_prefill_tokens."""


def tokens_per_page(config: EngineConfig, device_type: str, longest: int) -> int:
    """Tokens per page, as `EngineConfig.page_size` says.

    Args:
        longest: Tokens of the longest sequence, as the cache holds them.
    """
    if config.page_size is not None:
        return config.page_size
    if device_type != "cpu" or config.num_pages is not None:
        return PAGE_SIZE
    return slots_read(longest)


def max_prefill_tokens(config: EngineConfig, device_type: str) -> int:
    """Prompt tokens of one pass."""
    return config.max_prefill_tokens or MAX_PREFILL_TOKENS.get(device_type,
                                                               MAX_PREFILL_TOKENS["cuda"])
