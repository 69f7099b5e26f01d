"""One seed for every source of chance, and independent streams derived from it."""

from __future__ import annotations

import hashlib
import random


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below us read the legacy state
    torch.manual_seed(seed)


def derive(seed: int, *words: str | int) -> int:
    """A 63-bit seed for one purpose, so that a new use of chance never shifts an old one."""
    text = "/".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
