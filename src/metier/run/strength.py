"""After training: how much of the update is used, so that a floor of what must be kept is kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from metier import adapt
from metier.core import log
from metier.core.evidence import Strength
from metier.models import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from torch import nn

SHARES = (1.0, 0.85, 0.7, 0.5, 0.3, 0.15)
"""Shares of the update that are tried. Judgement: even steps of what is kept, which falls with the square of the share
at first."""


@dataclass(frozen=True)
class Dial:
    """A network whose start is kept, so that its update can be dialled once it is trained.

    Attributes:
        module: The network, adapted.
        new: Names of parameters that no checkpoint held.
        start: Where its weights before training are kept, on disk and not in memory.
        end: Where those after training are.
        validate: Takes its validation loss as it is.
        kept: Tells what it keeps of its general ability as it is.
    """

    module: nn.Module
    new: Collection[str]
    start: Path
    end: Path
    validate: Callable[[], float]
    kept: Callable[[], float]

    def begin(self) -> None:
        """Keep the weights as they are before the first step."""
        write_tensors(adapt.moving_weights(self.module), self.start)

    def stop(self) -> None:
        """Keep the weights as they are after the last step."""
        write_tensors(adapt.moving_weights(self.module), self.end)

    def path(self, base_loss: float, shares: Sequence[float] = SHARES) -> tuple[Strength, ...]:
        """Every share of the update, measured, once both ends are kept; the network is left with the last of them.

        Args:
            base_loss: Validation loss before the first step.
            shares: To be tried, in this order.
        """
        found = []
        with log.progress("strengths", len(shares)) as show:
            for number, share in enumerate(shares, 1):
                self.turn(share)
                gain = base_loss - self.validate()
                found.append(Strength(share=share, gain=gain, kept=self.kept(), chosen=False))
                show(number, f"{share:.0%} of the update: validation loss {-gain:+.4f}, {found[-1].kept:.1%} kept")
        return tuple(found)

    def hold(self, base_loss: float, floor: float, *, fitted: bool) -> tuple[Strength, ...]:
        """The path with the share chosen that the floor allows, once both ends are kept; the network is left with it.

        Args:
            base_loss: Validation loss before the first step.
            floor: Share of the general ability that must be kept.
            fitted: Whether something was fitted in closed form before: none of the update is then a share as well.
        """
        path = choose(self.path(base_loss, (*SHARES, 0.0) if fitted else SHARES), floor)
        self.turn(chosen(path).share)
        return path

    def turn(self, share: float) -> None:
        """Use so much of the update; both ends are kept."""
        from safetensors import safe_open

        opened = partial(safe_open, framework="pt")
        with opened(self.start) as start, opened(self.end) as end:
            adapt.set_strength(self.module, share, start=start.get_tensor, end=end.get_tensor, new=self.new)


def choose(path: Sequence[Strength], floor: float) -> tuple[Strength, ...]:
    """The path with one share chosen: of those that keep the floor the one that gains most; the first of equal ones.

    Where none keeps it, the one that keeps most.
    """
    keeping = [strength for strength in path if strength.kept >= floor]
    best = max(keeping, key=lambda s: s.gain) if keeping else max(path, key=lambda s: s.kept)
    return tuple(strength.model_copy(update={"chosen": strength is best}) for strength in path)


def chosen(path: Sequence[Strength]) -> Strength:
    """The strength of a path that the floor chose."""
    return next(strength for strength in path if strength.chosen)


def said(path: Sequence[Strength], floor: float) -> str:
    """What the floor did, as a sentence."""
    used = chosen(path)
    whole = next((s for s in path if s.share == 1), used)
    figures = f"{used.kept:.1%} of the general ability kept where {floor:.1%} were asked for"
    if used.kept < floor:
        return f"the floor was not kept: even {used.share:.0%} of the update leaves {figures}"
    if used.share == 1:
        return f"the whole update is used: {figures}"
    return (
        f"{used.share:.0%} of the update is used: {figures}; the whole would keep {whole.kept:.1%}, with "
        f"{used.gain - whole.gain:+.3f} of validation loss"
    )
