"""From what the units said to what the experiment found: figures over rows and seeds, pairs, rows won and lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metier import evaluation
from metier.core.comparison import Arm, Cell, CurvePoint, Guard, Pair, Predicted, Stability, Told, Trial
from metier.core.evidence import Estimate
from metier.data.records import Cell as DataCell
from metier.evaluation import statistics
from metier.experiment import search
from metier.experiment.arms import guards_title
from metier.experiment.budget import SEARCH_SHARE

if TYPE_CHECKING:
    from metier.evaluation import Measured
    from metier.evaluation.measured import Rows
    from metier.experiment.arms import Arm as Way
    from metier.experiment.search import Tried
    from metier.experiment.trials import Ended
    from metier.planning import MethodPlan
    from metier.run.job import Job

SAID_TWICE = ("perplexity",)
"""Measures that are another one in other words; a pair of each would be counted twice."""
SHOWN = 60
"""Test rows told with the answers of every arm: first those on which arms differ."""


@dataclass(frozen=True)
class Seed:
    """One arm with one seed.

    Attributes:
        seed: The seed.
        ended: How its training ended.
        measured: What it scored; None where it diverged.
    """

    seed: int
    ended: Ended
    measured: Measured | None


@dataclass(frozen=True)
class Found:
    """All that was made of one arm.

    Attributes:
        way: What it is.
        rate: The rate that the search chose.
        tried: The search, in order, and what each trial said.
        trials: The same as units ended.
        seeds: The whole trainings.
        planned: What the plan said of one whole training: seconds and bytes.
    """

    way: Way
    rate: float
    tried: Sequence[Tried]
    trials: Sequence[Ended]
    seeds: Sequence[Seed]
    planned: MethodPlan | None
    planned_seconds: float | None

    @property
    def alive(self) -> dict[int, Measured]:
        """What each seed scored that did not diverge."""
        return {one.seed: one.measured for one in self.seeds if one.measured is not None}


@dataclass(frozen=True)
class Scene:
    """What is the same for every arm.

    Attributes:
        job: The job.
        before: The base's figures.
        primary: The measure that decides.
        confidence: Coverage of every interval.
        delta: Differences below this count as none, as the recipe says it.
        clusters: Which test rows were drawn together; None where each stands for itself.
    """

    job: Job
    before: Measured
    primary: str
    confidence: float
    delta: float
    clusters: tuple[str, ...] | None

    def clusters_of(self, name: str, rows: Rows) -> tuple[str, ...] | None:
        """The clusters where a measure's values belong to the test rows, not to targets or general items."""
        of_rows = rows.group == "domain" and not name.endswith(("_target", "_target_median"))
        fits = self.clusters is not None and len(rows.values) == len(self.clusters)
        return self.clusters if of_rows and fits else None

    def estimate(self, name: str, cells: Sequence[Rows]) -> Estimate:
        """A measure over rows and seeds."""
        return evaluation.over_seeds(name, cells, self.confidence, self.clusters_of(name, cells[0]))


def clusters_of(job: Job) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Which test rows were drawn together, by the recipe's groups, or donors of cells; and what is to be said of it."""
    group = job.recipe.data.group
    if group == "none" or (group is None and not (len(job.test) and isinstance(job.test[0], DataCell))):
        return None, ()
    name = group or "donor"
    ids = tuple(str(record.extras.get(name, "")) for record in job.test)
    if len(set(ids)) < 2:
        said = f"all test rows are of one {name}: intervals say nothing of others"
        return None, (said,) if group else ()
    return ids, ()


def arm(found: Found, scene: Scene) -> Arm:
    """One arm, summed up."""
    alive = list(found.alive.values())
    figures = {name: scene.estimate(name, [m.rows[name] for m in alive]) for name in _common(alive)}
    shares = [share for m in alive if (share := evaluation.kept(scene.before, m)) is not None]
    one = found.seeds[0].ended
    return Arm(
        name=found.way.name,
        title=found.way.title,
        method=one.method,
        learning_rate=found.rate,
        at_edge=bool(found.tried) and search.is_at_edge(found.tried),
        trials=tuple(
            Trial(rate=t.rate, stage=t.stage, loss=t.loss if math.isfinite(t.loss) else None, seconds=ended.seconds)
            for t, ended in zip(found.tried, found.trials, strict=True)
        ),
        cells=tuple(_cell(seed, scene) for seed in found.seeds),
        figures=figures,
        kept=statistics.mean(np.array(shares), scene.confidence) if shares else None,
        stability=_stability(found, scene),
        parameters_moved=one.parameters_moved,
        bytes_on_disk=max(seed.ended.bytes_on_disk for seed in found.seeds),
        seconds_to_load=float(np.mean([seed.ended.seconds_to_load for seed in found.seeds])),
        search_seconds=sum(ended.seconds for ended in found.trials),
        predicted=_predicted(found),
    )


def _predicted(found: Found) -> Predicted:
    trials = [ended for ended in found.trials if not ended.diverged]
    return Predicted(
        seconds=found.planned_seconds,
        seconds_by_trials=float(np.mean([e.seconds for e in trials])) / SEARCH_SHARE if trials else None,
        seconds_measured=float(np.mean([seed.ended.seconds for seed in found.seeds])),
        peak_memory_bytes=found.planned.peak_bytes if found.planned else None,
        peak_memory_bytes_by_trials=max((ended.peak_memory_bytes for ended in trials), default=None),
        peak_memory_bytes_measured=max(seed.ended.peak_memory_bytes for seed in found.seeds),
    )


def _cell(seed: Seed, scene: Scene) -> Cell:
    ended, measured = seed.ended, seed.measured
    figures = (
        {} if measured is None else {name: scene.estimate(name, [rows]).value for name, rows in measured.rows.items()}
    )
    return Cell(
        seed=seed.seed,
        figures=figures,
        kept=None if measured is None else evaluation.kept(scene.before, measured),
        best_step=ended.best_step,
        steps=ended.steps,
        seconds_to_best=ended.seconds_to_best,
        seconds=ended.seconds,
        cpu_seconds=ended.cpu_seconds,
        peak_memory_bytes=ended.peak_memory_bytes,
        tokens_per_second=ended.tokens_per_second,
        diverged=ended.diverged,
        strengths=ended.strengths,
    )


def _stability(found: Found, scene: Scene) -> Stability:
    rows = [m.rows[scene.primary] for m in found.alive.values()]
    values = [scene.estimate(scene.primary, [one]).value for one in rows]
    trainings = [*found.trials, *(seed.ended for seed in found.seeds)]
    worst = min if rows and rows[0].higher_is_better else max
    return Stability(
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        worst=worst(values) if values else None,
        diverged=sum(one.diverged for one in trainings) / len(trainings),
        sensitivity=search.sensitivity(found.tried),
    )


def guards(found: Sequence[Found], scene: Scene) -> tuple[tuple[Guard, ...], tuple[str, ...]]:
    """What each guard against forgetting moves beside the same method without it; and what could not be judged."""
    made, notes = [], []
    for one in found:
        if not one.way.guards:
            continue
        plain = next((two for two in found if two.way == one.way.unguarded([other.way for other in found])), None)
        guard = None if plain is None else _guard(one, plain, scene)
        if guard is not None:
            made.append(guard)
        else:
            notes.append(f"{one.way.name}: {_why_not_judged(plain)}")
    return tuple(made), tuple(notes)


def _why_not_judged(plain: Found | None) -> str:
    if plain is None:
        return "whether the guard helps is not judged: compare.methods has not the same method without it"
    return "whether the guard helps is not judged: two seeds with their strengths are needed for that"


def _guard(one: Found, plain: Found, scene: Scene) -> Guard | None:
    """A guard beside the arm without it; None where fewer than two seeds have strengths in both."""
    with_it, without = ({s.seed: s.ended.strengths for s in two.seeds if s.ended.strengths} for two in (one, plain))
    seeds = [seed for seed in with_it if seed in without]
    if len(seeds) < 2:
        return None
    kept, kept_without, difference, verdict = evaluation.front_moved(
        [with_it[seed] for seed in seeds],
        [without[seed] for seed in seeds],
        rows=len(scene.job.validation),
        delta=scene.delta,
        confidence=scene.confidence,
    )
    alive = list(one.alive.values())
    return Guard(
        arm=plain.way.name,
        name="+".join(one.way.guards),
        title=guards_title(one.way),
        strengths=one.way.guards,
        figures={name: scene.estimate(name, [m.rows[name] for m in alive]).value for name in _common(alive)},
        kept=kept,
        kept_without=kept_without,
        difference=difference,
        verdict=verdict,
    )


def pairs(found: Sequence[Found], scene: Scene) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    """Every arm against the base and against every earlier one, the primary measure first; and what could not be."""
    made: list[Pair] = []
    notes: list[str] = []
    for place, right in enumerate(found):
        if right.alive:
            made += _beside("base", {}, right, scene, notes)
        for left in found[:place]:
            made += _beside(left.way.name, left.alive, right, scene, notes)
    ordered = sorted(made, key=lambda pair: not pair.primary)
    return evaluation.adjusted(ordered, scene.confidence), tuple(dict.fromkeys(notes))


def _beside(left: str, alive: Mapping[int, Measured], right: Found, scene: Scene, notes: list[str]) -> list[Pair]:
    """The pairs of two arms over the seeds that both have; an empty `alive` stands for the base."""
    seeds = [seed for seed in right.alive if not alive or seed in alive]
    others = [alive[seed] for seed in seeds] if alive else [scene.before]
    mine = [right.alive[seed] for seed in seeds]
    made = []
    for name in _common([*others, *mine]):
        one, two = [m.rows[name] for m in others], [m.rows[name] for m in mine]
        if name in SAID_TWICE or (one[0].kind == "distance" and not alive):
            continue
        if len({len(rows.values) for rows in (*one, *two)}) > 1:
            notes.append(f"{two[0].title}: arms are not compared, for it could not be taken on the same rows for all")
            continue
        pair = evaluation.pair(
            name,
            (left, one),
            (right.way.name, two),
            primary=name == scene.primary,
            delta=delta_of(name, two[0], scene),
            confidence=scene.confidence,
            clusters=scene.clusters_of(name, two[0]),
        )
        made += [] if pair is None else [pair]
    return made


def delta_of(name: str, rows: Rows, scene: Scene) -> float:
    """Differences below this count as none: the recipe's delta, as a part of the base's figure for losses."""
    value = scene.estimate(name, [scene.before.rows.get(name, rows)]).value
    return evaluation.usual_delta(rows, value, scene.delta)


def point(way: Way, share: float, rows: int, rate: float, cells: Sequence[Measured], scene: Scene) -> CurvePoint:
    """One arm on a part of the training rows."""
    taken = [cell.rows[scene.primary] for cell in cells]
    return CurvePoint(
        arm=way.name,
        share=share,
        rows=rows,
        learning_rate=rate,
        values=tuple(scene.estimate(scene.primary, [one]).value for one in taken),
        estimate=scene.estimate(scene.primary, taken),
    )


def told(found: Sequence[Found], scene: Scene) -> tuple[Told, ...]:
    """Test rows with the answers of the base and of every arm's first seed; first those on which the arms differ."""
    first = {one.way.name: next(iter(one.alive.values())) for one in found if one.alive}
    if not first:
        return ()
    sides = {name: scene.job.answers(scene.before, measured, scene.primary) for name, measured in first.items()}
    made = []
    for answers in zip(*sides.values(), strict=True):
        here = dict(zip(sides, answers, strict=True))
        one = answers[0]
        said = {} if one.before is None else {"base": one.before}
        right = {} if one.before_right is None else {"base": one.before_right}
        said |= {name: answer.after for name, answer in here.items()}
        right |= {name: answer.after_right for name, answer in here.items() if answer.after_right is not None}
        made.append(Told(where=one.where, prompt=one.prompt, reference=one.reference, answers=said, right=right))
    made.sort(key=lambda row: len({row.right.get(name) for name in first}) < 2)
    return tuple(made[:SHOWN])


def described(found: Sequence[Found], before: Measured) -> dict[str, dict[str, Any]]:
    """Titles, units, directions and groups of every measure."""
    rows: dict[str, Rows] = dict(before.rows)
    for one in found:
        for measured in one.alive.values():
            rows |= {name: known for name, known in measured.rows.items() if name not in rows}
    return {
        "titles": {name: one.title for name, one in rows.items()},
        "units": {name: one.unit for name, one in rows.items()},
        "higher_is_better": {name: one.higher_is_better for name, one in rows.items()},
        "groups": {name: one.group for name, one in rows.items()},
    }


def _common(cells: Sequence[Measured]) -> list[str]:
    """Names of the measures that every cell has."""
    return [name for name in cells[0].rows if all(name in cell.rows for cell in cells)] if cells else []
