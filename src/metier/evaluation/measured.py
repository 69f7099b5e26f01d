"""What one state of a model scored, row by row, so that two states can be compared on the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from metier.core import StorageError, commits, files
from metier.core.evidence import Baseline
from metier.core.log import warn
from metier.models import blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

ANCHORS, FACTS = "anchors.safetensors", "measured.json"


@dataclass(frozen=True)
class Rows:
    """A metric's values, one for each row.

    Attributes:
        title: What a reader calls the metric.
        group: Whether it says what was gained or what was kept.
        kind: "share" for 0 or 1, "mean", "median", "ratio" for totals over weights, "perplexity" for exp of such a
            ratio, "whole" for a figure of all rows together, "distance" for a mean that has no value before.
        unit: How it is printed.
        higher_is_better: Which way is good.
        values: Totals for ratios, class numbers of the answers for a whole, else the values; shape (rows,).
        weights: Weights of a ratio, class numbers of the references for a whole, else ones; shape (rows,).
    """

    title: str
    group: Literal["domain", "retention"]
    kind: Literal["share", "mean", "median", "ratio", "perplexity", "whole", "distance"]
    unit: Literal["share", "nats", "ratio", "score"]
    higher_is_better: bool
    values: Array
    weights: Array


@dataclass(frozen=True)
class Measured:
    """One state of a model, measured.

    Attributes:
        rows: Metric values by name, in the order they are reported.
        answers: The model's answer to each test row; empty where none were made.
        anchors: What distances from this state are taken against: log-probabilities, embeddings; only of a base.
        baselines: Cheap alternatives, fitted with this state; only of a base.
        notes: What could not be measured, and why.
    """

    rows: Mapping[str, Rows]
    answers: tuple[str, ...]
    anchors: Mapping[str, Tensor] = field(default_factory=dict)
    baselines: tuple[Baseline, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Commit to `folder`; only time is lost where that fails, so it is said and nothing more."""
        rows = {
            name: {**vars(found), "values": found.values.tolist(), "weights": found.weights.tolist()}
            for name, found in self.rows.items()
        }
        baselines = [baseline.model_dump() for baseline in self.baselines]
        facts = {"rows": rows, "answers": self.answers, "baselines": baselines, "notes": self.notes}
        try:
            commits.commit(folder, {ANCHORS: blocks(self.anchors), FACTS: [files.as_json(facts).encode()]})
        except StorageError as error:
            warn(f"the base's figures are not kept for the next run: {error.faults[0].what}", cache=str(folder))

    @classmethod
    def load(cls, folder: Path) -> Measured | None:
        """What `save` wrote, or None where nothing whole is."""
        from safetensors.torch import load_file

        if commits.find_damage(folder):
            return None
        found = json.loads((folder / FACTS).read_text("utf-8"))
        anchors = load_file(folder / ANCHORS)
        rows = {
            name: Rows(**{**facts, "values": np.array(facts["values"]), "weights": np.array(facts["weights"])})
            for name, facts in found["rows"].items()
        }
        baselines = tuple(Baseline.model_validate(baseline) for baseline in found["baselines"])
        return cls(rows, tuple(found["answers"]), anchors, baselines, tuple(found["notes"]))
