"""The same clock, token count and memory gauge in the process of every engine.

The engines share nothing but PyTorch, so the figures are taken there: a mark at the end of every optimizer step, and a
count of the tokens that pass through the embedding of words. What an engine prints about itself is not used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from collections.abc import Sequence

PADDING = (0, 2)
"""Ids that engines fill rows with; no row ends in one but for its closing token."""
SMALLEST_VOCABULARY = 20_000
"""Embeddings of positions and token types are smaller."""


@dataclass(frozen=True)
class Mark:
    """The state of the process at the end of an optimizer step; `busy` is what all processes of the machine used."""

    wall: float
    cpu: float
    busy: float
    age: float
    seen: int
    memory: int


class Meter:
    """Marks each optimizer step of this process and writes one line at the end."""

    def __init__(self, job: dict[str, Any], version: str) -> None:
        """Begin to watch.

        Args:
            job: What the driver asked for.
            version: Version of the engine.
        """
        self._job, self._version = job, version
        self._marks: list[Mark] = []
        self._seen = 0
        self._last: int | None = None
        register_optimizer_step_post_hook(self._after_step)
        self._watch_embedding()

    def end_after(self, steps: int) -> None:
        """Write the line and leave after so many steps: what engines do afterwards is not compared."""
        self._last = steps

    def finish(self, tokens_by_step: Sequence[int] | None = None) -> None:
        """Write the line.

        Args:
            tokens_by_step: Real tokens of each step where the engine's own log has them; else the embedding's count.
        """
        counts = [mark.seen for mark in self._marks]
        if tokens_by_step is not None:
            counts = [sum(tokens_by_step[: at + 1]) for at in range(len(tokens_by_step))]
        with Path(self._job["out"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._line(counts)) + "\n")

    def _line(self, counts: list[int]) -> dict[str, Any]:
        first, last = self._marks[0], self._marks[-1]
        # The share of the pass that was counted, times the tokens of its rows by the one tokenization used for all.
        counted = 1 - counts[0] / counts[-1]
        return {
            "engine": self._job["engine"],
            "version": self._version,
            "torch": torch.__version__,
            "settings": self._job["settings"],
            "work": self._job["work"],
            "round": self._job["round"],
            "useful_tokens": round(self._job["useful_tokens"] * counted),
            "seconds": last.wall - first.wall,
            "cpu_seconds": last.cpu - first.cpu,
            "others_cpu_seconds": max(0.0, (last.busy - first.busy) - (last.cpu - first.cpu)),
            "peak_memory_bytes": max(mark.memory for mark in self._marks),
            "first_step_seconds": first.age,
            "steps": len(self._marks),
            "seen_share": counts[-1] / self._job["useful_tokens"],
            "marks": [asdict(mark) for mark in self._marks],
        }

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if type(optimizer).__name__ == "AcceleratedOptimizer":
            return  # a wrapper; the optimizer inside is marked
        self._marks.append(Mark(time.perf_counter(), time.process_time(), busy(), age(), self._seen, peak_memory()))
        if len(self._marks) == self._last:
            self.finish()
            sys.stdout.flush()
            os._exit(0)

    def _watch_embedding(self) -> None:
        plain = nn.Embedding.forward

        def forward(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            if module.training and module.num_embeddings >= SMALLEST_VOCABULARY:
                self._seen += real(ids)
            return plain(module, ids)

        nn.Embedding.forward = forward


def real(ids_BT: torch.Tensor) -> int:
    """Tokens of a batch less the padding at the end of each row."""
    filled_BT = (torch.isin(ids_BT, torch.tensor(PADDING, device=ids_BT.device)).logical_not()).long()
    places_T = torch.arange(1, ids_BT.shape[-1] + 1, device=ids_BT.device)
    return int((filled_BT * places_T).amax(-1).sum())


def age() -> float:
    """Seconds since this process began."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def busy() -> float:
    """Seconds that the machine's processors have worked: what others took of a run makes it unfit to be compared."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """Most resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def job() -> dict[str, Any]:
    """The job that the driver wrote, with the threads set."""
    found = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(found["threads"])
    return found


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The training rows."""
    return [json.loads(line) for line in Path(found["rows"]).read_text("utf-8").splitlines()]


def sort_whole_pass() -> None:
    """Let transformers group by length over all rows.

    Its sampler sorts within groups of 50 batches, fewer if there are not four such groups. In a pass as short as these
    that would be next to no sorting; with the rows of a real job it is almost a full sort.
    """
    from transformers import trainer_pt_utils

    plain = trainer_pt_utils.get_length_grouped_indices

    def grouped(
        lengths: list[int],
        batch_size: int,
        mega_batch_mult: int | None = None,  # noqa: ARG001 - it is what is replaced
        generator: torch.Generator | None = None,
    ) -> list[int]:
        return plain(lengths, batch_size, mega_batch_mult=50, generator=generator)

    trainer_pt_utils.get_length_grouped_indices = grouped
