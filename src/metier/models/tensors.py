"""Tensors out to a file, the same way for every network of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError

from metier.core.files import storage_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise storage_error(path, OSError(str(error))) from error
    except OSError as error:
        raise storage_error(path, error) from error
