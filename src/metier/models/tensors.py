"""Tensors out to a file, the same way for every network of ours.

Source of the format: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from metier.core import files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls a kind of number."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, which replaces one of that name once it is whole and durable.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    with files.staged_file(path, synced=True) as staged:
        files.write(staged, blocks(tensors))


def blocks(tensors: Mapping[str, Tensor]) -> Iterator[files.Block]:
    """The content of a safetensors file, tensor by tensor, so that no second copy of all of them exists."""
    # Wide numbers first, so that each tensor begins where a number of its kind may.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    # Other readers ask whose tensors these are.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield memoryview(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
