"""From counts to what is learnt, and back; what was not measured stays NaN.

Shapes: B cells, G genes, P proteins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from metier.core import DataError

Values = NDArray[np.float32]
TransformName = Literal["clr", "log1p", "minmax", "none"]
LOWEST = 1e-8
"""The smallest scaled value, so that nothing counted differs from padding. Source: scTranslator's `normalization`."""


@dataclass(frozen=True, slots=True)
class Transform:
    """How protein counts become targets.

    Attributes:
        name: "clr": log1p of the counts over exp of their mean log1p in the cell, over measured proteins; "log1p";
            "minmax": each cell from 1e-8 to 1, a cell whose proteins are all equal 1e-8 throughout; "none".

    Source: clr, Stoeckius et al. 2017, doi:10.1038/nmeth.4380, as Seurat's NormalizeData(normalization.method = "CLR",
    margin = 2) computes it; minmax, scTranslator's `normalization`.
    """

    name: TransformName

    def __post_init__(self) -> None:
        """Only the four names are known.

        Raises:
            DataError: If it is another.
        """
        if self.name not in get_args(TransformName):
            hint = f"choose {', '.join(get_args(TransformName))}"
            raise DataError(f"{self.name!r} is no transform of proteins", where="task.transform", hint=hint)

    @property
    def needs_like(self) -> bool:
        """Whether the way back needs the counts of the same cells, because each cell's scale was taken away."""
        return self.name in {"clr", "minmax"}

    def apply(self, x_BP: NDArray[Any]) -> Values:
        """Counts on the scale that is learnt."""
        values = np.asarray(x_BP, dtype=np.float64)
        if self.name == "clr":
            values = np.log1p(values / np.exp(_mean(np.log1p(values))))
        elif self.name == "log1p":
            values = np.log1p(values)
        elif self.name == "minmax":
            low, span = _range(values)
            values = LOWEST + (values - low) / np.where(span > 0, span, 1) * (1 - LOWEST)
        return values.astype(np.float32)

    def inverse(self, y_BP: NDArray[Any], like_BP: NDArray[Any] | None = None) -> Values:
        """Values on the scale that is learnt as counts.

        Args:
            y_BP: What `apply` gave, or a prediction of it.
            like_BP: Counts of the same cells, whose mean or range gives each cell its scale back.

        Raises:
            DataError: If the way back needs `like_BP`.
        """
        if self.needs_like and like_BP is None:
            what = f"{self.name} takes each cell's own scale away: there is no way back without measured counts"
            raise DataError(
                what, where="task.transform", hint="give the counts of the same cells, or use log1p or none"
            )
        values = np.asarray(y_BP, dtype=np.float64)
        like = np.asarray(like_BP, dtype=np.float64)
        if self.name == "clr":
            values = np.expm1(values) * np.exp(_mean(np.log1p(like)))
        elif self.name == "log1p":
            values = np.expm1(values)
        elif self.name == "minmax":
            low, span = _range(like)
            values = low + (values - LOWEST) / (1 - LOWEST) * span
        return values.astype(np.float32)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each cell's measured values, 0 for a cell without any; shape (B, 1)."""
    has = ~np.isnan(values)
    total: NDArray[np.float64] = np.where(has, values, 0).sum(axis=1, keepdims=True)
    mean: NDArray[np.float64] = total / np.maximum(has.sum(axis=1, keepdims=True), 1)
    return mean


def _range(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest measured value of each cell and the span to the highest; 0 and 0 for a cell without any."""
    gaps = np.isnan(values)
    low = np.where(gaps, np.inf, values).min(axis=1, keepdims=True, initial=np.inf)
    high = np.where(gaps, -np.inf, values).max(axis=1, keepdims=True, initial=-np.inf)
    low = np.where(np.isfinite(low), low, 0)
    return low, np.where(np.isfinite(high), high, low) - low


def log_normalise(counts_BG: Any, target: float = 1e4) -> Any:
    """RNA counts scaled to `target` in each cell, then log1p; a `csr_matrix`, and cells without a count stay empty."""
    from scipy import sparse

    found = sparse.csr_matrix(counts_BG, dtype=np.float32, copy=True)
    sums_B = np.asarray(found.sum(axis=1, dtype=np.float64)).ravel()
    scale_B = target / np.where(sums_B > 0, sums_B, 1)
    found.data = np.log1p(found.data * np.repeat(scale_B, np.diff(found.indptr))).astype(np.float32)
    return found
