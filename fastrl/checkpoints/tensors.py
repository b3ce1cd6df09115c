"""A safetensors file made in pieces: a header, then the memory of each tensor as it lies.

The library's own writer takes a path or makes one large text of bytes; this one needs no second
copy of the tensors, and its writes go where `fastrl.checkpoints.files` sees them.

Source: the safetensors format, https://github.com/huggingface/safetensors
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}
_PIECE_BYTES = 1 << 24


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file that holds these contiguous CPU tensors, in order."""
    # Wide types first, so that every tensor begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        assert tensor.dtype in _NAMES, f"{name}: a checkpoint cannot hold {tensor.dtype}"
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        if not tensors[name].numel():
            continue
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), _PIECE_BYTES):
            yield data[begin:begin + _PIECE_BYTES]
