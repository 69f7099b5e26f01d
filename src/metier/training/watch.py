"""Telling a run whose weights are being destroyed from one that met a hard batch.

A loss far above those before it has one of two causes. Either the rows are unlike the others: then the network is as
good as it was. Or the last step ruined the weights: then the network has also lost what it knew of rows that it has
just learnt from. So a spike is a question, and scoring the rows of an earlier step once more answers it, before the
next step is taken. Noise alone never stops a run, for it moves no weights.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

from metier.core import DivergedError
from metier.training.early import UNTOUCHED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

WINDOW = 64
"""Losses that say what is usual. Judgement; between a step's noise and an epoch's trend."""
SPREADS = 10.0
"""A loss so many spreads above the median is a spike; a spread is 1.4826 times the median absolute deviation, the
standard deviation of normal noise. Source: Hampel 1974, doi:10.1080/01621459.1974.10482962, who takes 3 to find
outliers; losses of small batches have long tails, and a spike only asks for a second look."""
RUINED = 3.0
"""A network this many times as bad as before its first step has nothing left to save. A language model that has lost
everything scores about the logarithm of its vocabulary, 10 to 12 nats, where a pretrained one has 1 to 3."""
LOST = 0.5
"""Share of all that was learnt whose loss, step after step, ends a run as well. Judgement."""
PATIENCE = 20
"""Spikes in a row that count as lost for good. Of losses drawn at random, 20 in a row all above the 64 before
them have a chance of 20! 64! / 84! = 1e-18."""


class Watch:
    """The losses of a run so far, and whether the next one may be followed."""

    def __init__(self, start: float, score: Callable[[Sequence[Any]], float], *, before: Iterable[float] = ()) -> None:
        """Begin with what is known.

        Args:
            start: Mean loss of a scored element before the first step, on rows that are not trained on.
            score: Takes the mean loss of some examples with the weights as they are.
            before: Losses of earlier steps, where the run is resumed.
        """
        # Where nobody knows how it was, nothing counts as lost.
        self._start, self._score = start if math.isfinite(start) else math.inf, score
        self._usual = deque([self._start], maxlen=WINDOW)
        self._spikes = 0
        self._seen: tuple[float, Sequence[Any]] | None = None
        for loss in before:
            self._note(loss)

    @property
    def spiked(self) -> bool:
        """Whether the loss last looked at was a spike."""
        return self._spikes > 0

    def check(self, loss: float, rows: Sequence[Any]) -> None:
        """Look at the loss of a step before it is taken.

        Args:
            loss: Mean loss of its rows.
            rows: The examples.

        Raises:
            DivergedError: If the weights are ruined.
        """
        level = median(self._usual)
        if self._note(loss):
            self._judge(loss, level)
        else:
            self._seen = loss, rows

    def _note(self, loss: float) -> bool:
        """Whether the loss is a spike; if not, it says what is usual from now on."""
        if loss - median(self._usual) > self._reach():
            self._spikes += 1
            return True
        self._spikes = 0
        self._usual.append(loss)
        return False

    def _reach(self) -> float:
        """How far above the median a loss may lie: by noise, by its size, and by half of what was learnt."""
        level = median(self._usual)
        spread = 1.4826 * median(abs(loss - level) for loss in self._usual)
        return max(SPREADS * spread, (RUINED - 1) * abs(level), LOST * (self._start - level))

    def _judge(self, loss: float, level: float) -> None:
        said = f"loss {loss:.4g}, where {level:.4g} was usual"
        if self._spikes >= PATIENCE:
            raise _diverged(f"{said}, for {self._spikes} steps in a row")
        if self._seen is None:
            return
        before, rows = self._seen
        now = self._score(rows)
        # Not "greater": a loss that is no number is ruin as well.
        if not now - before <= max(self._reach(), RUINED * abs(self._start) - level):
            raise _diverged(f"{said}; rows that had {before:.4g} before the last step now have {now:.4g}")


def _diverged(what: str) -> DivergedError:
    return DivergedError(what, where=UNTOUCHED, hint="lower train.learning_rate to a third")
