"""Operations: tensors in, tensors out, one file each, with every path of an op in its file."""

from fastrl.ops.kv_cache import write_kv
from fastrl.ops.packed_attention import packed_attention
from fastrl.ops.paged_attention import paged_attention
from fastrl.ops.sampling import sample_tokens

__all__ = ["packed_attention", "paged_attention", "sample_tokens", "write_kv"]
