"""One seed for every source of chance, and independent streams derived from it."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


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


def state() -> dict[str, Any]:
    """Where every source of chance stands, as values that JSON keeps exactly."""
    import numpy as np
    import torch

    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - as above
    found = {
        "python": random.getstate(),
        "numpy": [name, [int(key) for key in keys], int(place), int(has_gauss), float(gauss)],
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(one) for one in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
    }
    return found | ({"mps": _text(torch.mps.get_rng_state())} if torch.backends.mps.is_available() else {})


def restore(saved: Mapping[str, Any]) -> None:
    """Put every source of chance where it stood; of devices, those that there are now."""
    import numpy as np
    import torch

    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(_tensor(saved["torch"]))
    for number, text in enumerate(saved["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_tensor(text), number)
    if "mps" in saved and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_tensor(saved["mps"]))


def _text(state: Any) -> str:
    return bytes(state.numpy()).hex()


def _tensor(text: str) -> Any:
    import torch

    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
