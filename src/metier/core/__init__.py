"""Words every room shares: what a batch is, what a loss is, what can go wrong. No torch at import."""

from metier.core.errors import (
    BusyError,
    DataError,
    DivergedError,
    Fault,
    GateError,
    InterruptedRunError,
    MetierError,
    ModelError,
    RecipeError,
    StorageError,
    UnsafeError,
)
from metier.core.types import Batch, Loss, StepRecord

__all__ = [
    "Batch",
    "BusyError",
    "DataError",
    "DivergedError",
    "Fault",
    "GateError",
    "InterruptedRunError",
    "Loss",
    "MetierError",
    "ModelError",
    "RecipeError",
    "StepRecord",
    "StorageError",
    "UnsafeError",
]
