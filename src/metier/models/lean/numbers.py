"""In which number format our own arithmetic is done."""

from __future__ import annotations

import torch
from torch import Tensor


def working(x: Tensor) -> torch.dtype:
    """The format of matrix products: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def exact(dtype: torch.dtype) -> torch.dtype:
    """The format of sums and exponentials: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
