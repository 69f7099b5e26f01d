"""`compare:` -- several ways to tune one base, beside each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator

from metier.recipe.data import ReplaySection
from metier.recipe.guards import GuardsSection
from metier.recipe.method import FreezeMethod, FullMethod, LoRAMethod, MethodSection
from metier.recipe.section import Section

KINDS: dict[str, type[FullMethod] | type[FreezeMethod] | type[LoRAMethod]] = {
    "full": FullMethod,
    "freeze": FreezeMethod,
    "lora": LoRAMethod,
}
SHORT = {"r": "rank"}
"""Words of the field that stand for a key."""
REPLAY = "replay"
"""The guard that mixes rows in; its value is their share."""
SPAN = re.compile(r"(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s)?")
"""Such as 20min, 1h30min, 90s."""

Kind = TypeVar("Kind", bound=Section)
Percent = Annotated[float, Field(gt=0, le=100)]


@dataclass(frozen=True, slots=True)
class Tuning:
    """One way to tune.

    Attributes:
        method: What moves.
        guards: What holds it back from forgetting while it trains.
        replay: General rows that are practised beside the training rows; None where there are none.
    """

    method: MethodSection
    guards: GuardsSection = field(default_factory=GuardsSection)
    replay: ReplaySection | None = None


def read_tuning(word: str, usual: Tuning) -> Tuning:
    """The way to tune that a word such as "lora:rank=8,alpha=16+kl=0.1" means.

    Args:
        word: A kind, after a colon its settings, and after each plus sign a guard and its strength.
        usual: The recipe's own: its settings stand where the method is of the same kind and the word names none, and
            its guards where the word names no others.

    Raises:
        ValueError: If there is no such method, setting or guard; the message names what there is.
    """
    first, *guards = re.split(r"\+(?=[a-z])", word)
    method = _read_method(first, word, usual.method)
    given: dict[str, Any] = {}
    for pair in guards:
        key, equals, value = pair.partition("=")
        known = [*GuardsSection.model_fields, REPLAY]
        if not equals or key not in known:
            raise ValueError(
                f"{word!r}: there is no guard {pair!r}: {_near(key, known)}it is one of {', '.join(known)}, as in lora+kl=0.1"
            )
        given[key] = yaml.safe_load(value)
    share = given.pop(REPLAY, None)
    replay = usual.replay
    if share is not None:
        replay = _valid(ReplaySection, {**(replay.model_dump() if replay else {}), "share": share}, f"{word!r}: replay")
    held = _valid(GuardsSection, {**usual.guards.model_dump(), **given}, f"{word!r}:")
    return Tuning(method=method, guards=held, replay=replay)


def _read_method(first: str, word: str, usual: MethodSection) -> MethodSection:
    kind, _, settings = first.partition(":")
    if kind not in KINDS:
        raise ValueError(
            f"{word!r} is no method: {_near(kind, KINDS)}there are {', '.join(KINDS)}, with settings as in lora:rank=8"
        )
    given: dict[str, Any] = usual.model_dump() if usual.kind == kind else {"kind": kind}
    known = [key for key in KINDS[kind].model_fields if key != "kind"]
    for pair in filter(None, (part.strip() for part in settings.split(","))):
        key, equals, value = pair.partition("=")
        key = SHORT.get(key, key)
        if not equals or key not in known:
            listed = f"it has {', '.join(known)}, as in lora:rank=8" if known else "it has none"
            raise ValueError(f"{word!r}: {kind} has no setting {pair!r}: {_near(key, known)}{listed}")
        given[key] = yaml.safe_load(value)
    return _valid(KINDS[kind], given, f"{word!r}:")


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"did you mean {near[0]}? " if near else ""


def _valid(kind: type[Kind], given: Mapping[str, Any], said: str) -> Kind:
    """The section of these keys.

    Raises:
        ValueError: If one is wrong; the message begins with `said`.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{said} {place} {first['msg'][0].lower()}{first['msg'][1:]}") from None


def split_methods(text: str) -> list[str]:
    """The methods in a list such as "lora:rank=8,alpha=16,full+l2_sp=0.01": a setting belongs to the method before it."""
    found: list[str] = []
    for part in filter(None, ("".join(piece.split()) for piece in text.split(","))):
        if part.partition("=")[0].isidentifier() and "=" in part and found and ":" in found[-1]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def read_seconds(text: str) -> float:
    """A time span such as "20min", "1h30min" or "90s".

    Raises:
        ValueError: If it is none, or zero.
    """
    found = SPAN.fullmatch(text.strip().lower())
    parts = [float(part or 0) for part in found.groups()] if found else [0.0]
    seconds = sum(part * size for part, size in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"{text!r} is no time span: write it as 20min, 1h30min or 90s")
    return seconds


class CompareSection(Section):
    """What `metier compare` does: every method with the same rows, order, schedule, seeds, and as many tries at its learning rate."""

    methods: tuple[str, ...] = Field(default=("lora", "full"), min_length=1)
    """Ways to tune: "full", "freeze", "lora", with settings as in "lora:rank=8,alpha=16" and guards against forgetting as in "lora+kl=0.1" or "full+replay=0.05"; what a word does not set is taken from `method` where that is of the same kind, and from `guards` and `data.replay`."""
    seeds: int = Field(default=3, ge=1)
    """Whole trainings of each method, from `train.seed` on; the same seeds for every method."""
    trials: Literal[0, 3, 5] = 5
    """Short trainings of each method that look for its learning rate: 3 coarse points, then 2 fine ones beside the best, and the first seed is trained whole with the best and with one fine step below, of which validation takes one. More are made where the best lies at the end of what was tried; 0 takes `train.learning_rate` as it is."""
    budget: str | None = None
    """Time that all of it may take, such as "20min"; null sets none. What is left out to keep to it is said, in this order: parts of the data curve, fine points, seeds down to 2, test rows down to 100, methods but the first."""
    data_curve: tuple[Percent, ...] = ()
    """Shares of the training rows in percent on which every method is trained as well, such as [25, 50, 100]; smaller parts lie in the larger ones."""
    strengths: bool = True
    """After each whole training also try 30, 50, 70 and 85 % of the update on validation rows, where the general ability can be told: what would be kept and gained. Guards are judged by it. With `train.retain` shares are tried in any case, after every training, and decide."""
    delta: float = Field(default=0.01, gt=0)
    """Differences below this count as none: as it stands for shares and scores, as a part of the base's figure for losses."""

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        words = tuple("".join(word.split()) for word in methods)
        for word in words:
            read_tuning(word, Tuning(method=LoRAMethod()))
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands twice: name each method once")
        return words

    @field_validator("budget")
    @classmethod
    def _a_time_span(cls, budget: str | None) -> str | None:
        if budget is not None:
            read_seconds(budget)
        return budget

    @field_validator("data_curve")
    @classmethod
    def _each_share_once(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(shares)) < len(shares):
            raise ValueError("a share stands twice: name each once")
        return tuple(sorted(shares))

    @property
    def budget_seconds(self) -> float | None:
        """The budget in seconds."""
        return None if self.budget is None else read_seconds(self.budget)
