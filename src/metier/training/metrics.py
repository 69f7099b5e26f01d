"""`metrics.jsonl`: the run's memory of every step, one JSON object a line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import files
from metier.core.log import event
from metier.core.meter import peak_memory_bytes

if TYPE_CHECKING:
    from metier.core import StepRecord


class MetricsLog:
    """The log while a run writes it."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is written yet."""
        self._path = path

    def cut(self, upto: int | None) -> None:
        """Keep the lines up to a step, for a resumed run takes the later ones again; None begins anew.

        Raises:
            StorageError: If the disk is full.
        """
        kept = [line for line in read_metrics(self._path) if upto is not None and line["step"] <= upto]
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, record: StepRecord) -> None:
        """Note a step."""
        facts = asdict(record)
        del facts["most_tokens"]  # what the machine had room for is nothing that is learnt
        facts |= {"tokens_per_second": record.tokens / record.seconds, "memory_bytes": peak_memory_bytes()}
        self._append({"kind": "step", **facts})

    def validation(self, step: int, epoch: float, loss: float, *, best: bool) -> None:
        """Note a validation loss."""
        # JSON knows no NaN; null says that there was no number.
        said = loss if math.isfinite(loss) else None
        self._append({"kind": "validation", "step": step, "epoch": epoch, "loss": said, "best": best})

    def _append(self, line: dict[str, Any]) -> None:
        files.append(self._path, json.dumps(line) + "\n")
        event(**line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines
