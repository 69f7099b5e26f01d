"""The work of an experiment: what was made so far, what it took, and how much of the rest the budget allows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from metier import evaluation, planning
from metier.core import log
from metier.experiment import budget, findings, outline, parts, search
from metier.experiment.base import LoadedBase
from metier.experiment.budget import CHECKED, SEARCH_SHARE, Done, Prices, Size
from metier.experiment.findings import Found, Scene, Seed
from metier.experiment.search import Point, Tried
from metier.experiment.trials import Ended, Trials, Unit, told
from metier.recipe import FullMethod, LoRAMethod
from metier.run.job import Job, learning_rate, measured_rows
from metier.run.story import measure_base

if TYPE_CHECKING:
    from metier.core.comparison import CurvePoint
    from metier.evaluation import Measured
    from metier.experiment.arms import Arm
    from metier.experiment.folder import ExperimentFolder
    from metier.experiment.outline import Foreseen, Outline
    from metier.experiment.trials import Stage

LORA_OVER_FULL = 10.0
"""The best rate of an adapter over that of the whole network, to begin from; a search around it decides. Source:
tinker-cookbook's LoRA primer; TRL's reproduction of "LoRA Without Regret"."""


@dataclass(frozen=True)
class _Searched:
    """The search of one arm."""

    rate: float
    tried: tuple[Tried, ...]
    ended: tuple[Ended, ...]


class Work:
    """Where an experiment stands: what was made, what it took, and how much is still to be done."""

    def __init__(self, job: Job, arms: Sequence[Arm], folder: ExperimentFolder) -> None:
        """Foresee everything, and shrink it to the budget.

        Raises:
            RecipeError: If the budget fits not even one arm.
        """
        self.folder, self.all_arms = folder, tuple(arms)
        self.foreseen: Foreseen = outline.foresee(job, arms)
        self.allowed = job.recipe.compare.budget_seconds
        self.asked = outline.wanted(job, arms)
        self.size = self._remembered() or budget.fit(self.asked, self.foreseen.prices, self.allowed)
        self._remember()
        self.job = replace(job, test=measured_rows(job.test, self.size.rows, job.recipe.data.seed))
        self.primary = self.job.declared()
        self.notes: list[str] = []
        self._loaded: LoadedBase | None = None
        self._before: Measured | None = None
        self.trials = Trials(folder.path, self.job, self.foreseen.plans, self.base, self.before)
        self._made: list[tuple[Unit, Ended]] = []

    def outline(self) -> Outline:
        """The plan as it stands."""
        return outline.outline(self.foreseen, self.all_arms, self.asked, self.size, self.allowed)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that are left."""
        return tuple(arm for arm in self.all_arms if arm.name in self.size.arms)

    @property
    def spent(self) -> float:
        """Seconds so far, over all calls."""
        return self._base_seconds() + sum(
            ended.seconds + ended.trying_seconds + ended.measuring_seconds for _, ended in self._made
        )

    def base(self) -> LoadedBase:
        """The base, loaded when it is first needed."""
        if self._loaded is None:
            whole = self.job.fits or any(not isinstance(arm.method, LoRAMethod) for arm in self.all_arms)
            self._loaded = LoadedBase(self.job, self.folder.path / "trials", whole=whole)
        return self._loaded

    def before(self) -> Measured:
        """What the base scored, measured once."""
        if self._before is None:
            place = self.folder.base / str(self.size.rows)
            self._before = evaluation.Measured.load(place)
        if self._before is None:
            model = self.base().model
            began = time.perf_counter()
            job = replace(self.job, task=self.job.task.suited(model.module))
            measured = measure_base(job, model)
            self._before = replace(measured, baselines=(*measured.baselines, *job.prompted(model)))
            self._before.save(place)
            facts = {"fingerprint": model.lineage.fingerprint, "precision": self.base().precision.name}
            self.folder.remember("base", {"seconds": time.perf_counter() - began, **facts})
        return self._before

    def base_facts(self) -> dict[str, str]:
        """What the base is, and its number format."""
        found: dict[str, str] = self.folder.remembered("base")
        return found

    def close(self) -> None:
        """Let the base go."""
        if self._loaded is not None:
            self._loaded.close()

    def found(self) -> tuple[Found, ...]:
        """Everything that is to be made but the data curve, made or found again.

        Raises:
            DivergedError: If no rate of any arm gave a number.
        """
        self.before()
        searched = {arm.name: self._search(arm, None) for arm in self.arms if isinstance(arm.method, LoRAMethod)}
        first = next(iter(searched.values()), None)
        for arm in self.arms:
            if arm.name not in searched:
                searched[arm.name] = self._search(arm, first)
        cells: dict[str, list[Seed]] = {arm.name: [] for arm in self.arms}
        for number in range(self.asked.seeds):
            self._shrink()
            if number >= self.size.seeds:
                break
            for arm in self.arms:
                if not number:
                    searched[arm.name] = self._settled(arm, searched[arm.name])
                cells[arm.name].append(self._cell(arm, searched[arm.name].rate, number))
        return tuple(self._sum(arm, searched[arm.name], cells[arm.name]) for arm in self.arms)

    def curve(self, found: Sequence[Found], scene: Scene) -> tuple[CurvePoint, ...]:
        """Every arm on the parts of the training rows, and on all of them."""
        points: list[CurvePoint] = []
        if not self.asked.shares:
            return ()
        smallest, rates = self.asked.shares[0], {}
        for share in self.asked.shares:
            self._shrink()
            if share not in self.size.shares:
                continue
            job = parts.part(self.job, share)
            self.trials.give_part(share, job)
            for one in found:
                if share == smallest:
                    rates[one.way.name] = self._checked_rate(one, share)
                rate = _between(rates[one.way.name], one.rate, smallest, share)
                units = [self._unit(one.way, "curve", rate, seed.seed, share=share) for seed in one.seeds]
                cells = [self._measured(unit) for unit in units]
                alive = [cell for cell in cells if cell is not None]
                if alive:
                    points.append(findings.point(one.way, share, len(job.train), rate, alive, scene))
        whole = [
            findings.point(one.way, 1.0, len(self.job.train), one.rate, list(one.alive.values()), scene)
            for one in found
            if one.alive
        ]
        return (*points, *whole)

    def _search(self, arm: Arm, lora: _Searched | None) -> _Searched:
        """Look for the learning rate of an arm, on validation rows alone."""
        centre = self._centre(arm, lora)
        if not self.size.trials:
            return _Searched(centre, (), ())
        self._shrink()
        most = planning.highest_rate(arm.method, head=self.job.head, parameters=self.job.parameters)
        made: list[Ended] = []

        def attempt(point: Point) -> Tried:
            ended = self._make(Unit(arm, point.stage, point.rate, self.job.recipe.train.seed, length=SEARCH_SHARE))
            made.append(ended)
            floor = self.job.recipe.train.retain
            log.note(f"{arm.name}: learning rate {point.rate:g} ({point.stage}): {told(ended)}")
            return Tried(point.rate, point.stage, ended.loss_under(floor), ended.is_above_base(floor))

        tried = search.look(centre, attempt, fine=self.size.trials > CHECKED, most=most)
        hint = "look at the rows with `metier check`, or leave this method out"
        best = search.best_of(tried, where=f"compare.methods: {arm.name}", hint=hint)
        if best.diverged:
            self.notes.append(f"{arm.name}: no learning rate of the search was better than the base on validation")
        log.note(f"{arm.name}: learning rate {best.rate:g} is chosen")
        return _Searched(best.rate, tried, tuple(made))

    def _settled(self, arm: Arm, searched: _Searched) -> _Searched:
        """The search with the rate that the first seed, trained whole, prefers: its best, or a finer step below."""
        if not self.size.settling:
            return searched
        made: dict[float, Ended] = {}
        losses: dict[float, float] = {}

        def unit(rate: float) -> Unit:
            return self._unit(arm, "final", rate, self.job.recipe.train.seed)

        def whole(rate: float) -> float:
            made[rate] = self.trials.train(unit(rate))
            losses[rate] = made[rate].loss_under(self.job.recipe.train.retain)
            log.note(f"{arm.name}: learning rate {rate:g} (whole training): {told(made[rate])}")
            return losses[rate]

        taken = search.settled(searched.tried, searched.rate, whole)
        (left,) = made.keys() - {taken}
        self.trials.drop(unit(left), made[left])
        self._made.append((replace(unit(left), stage="whole"), made[left]))
        if taken != searched.rate:
            self.notes.append(
                f"{arm.name}: whole trainings take the learning rate {taken:g}, a finer step below the search's best: "
                f"the first seed's validation loss is {losses[taken]:.4f} with it, {losses[left]:.4f} with {left:g}"
            )
        return replace(searched, rate=taken)

    def _centre(self, arm: Arm, lora: _Searched | None) -> float:
        """Where the search begins: the recipe's rate for its own method, a tenth of an adapter's, or a guess."""
        recipe = self.job.recipe
        rate = recipe.train.learning_rate
        if rate != "auto" and (arm.method.kind == recipe.method.kind or not self.size.trials):
            return rate
        if isinstance(arm.method, FullMethod) and lora is not None and not self.job.scratch:
            return search.rounded(lora.rate / LORA_OVER_FULL)
        made = recipe.with_train(learning_rate="auto").model_copy(update={"method": arm.method})
        return learning_rate(replace(self.job, recipe=made))[0]

    def _cell(self, arm: Arm, rate: float, number: int) -> Seed:
        seed = self.job.recipe.train.seed + number
        unit = self._unit(arm, "final", rate, seed)
        ended = self._make(unit)
        log.note(f"{arm.name}, seed {seed}: {told(ended)}")
        return Seed(seed, ended, self.trials.measured(unit))

    def _checked_rate(self, one: Found, share: float) -> float:
        """The best of three rates on a part of the rows, on validation."""
        losses = {}
        for rate in (one.rate, one.rate * search.STEP, one.rate / search.STEP):
            unit = self._unit(one.way, "check", search.rounded(rate), self.job.recipe.train.seed, share=share)
            ended = self._make(unit)
            losses[unit.rate] = ended.loss_under(self.job.recipe.train.retain)
        return min(losses, key=lambda rate: losses[rate])

    def _measured(self, unit: Unit) -> Measured | None:
        self._make(unit)
        return self.trials.measured(unit)

    def _unit(self, arm: Arm, stage: Stage, rate: float, seed: int, *, share: float = 1.0) -> Unit:
        rows = self.size.rows if self.size.rows < self.asked.rows else None
        return Unit(arm, stage, rate, seed, share=share, rows=rows)

    def _make(self, unit: Unit) -> Ended:
        ended = self.trials.make(unit)
        self._made.append((unit, ended))
        return ended

    def _sum(self, arm: Arm, searched: _Searched, cells: Sequence[Seed]) -> Found:
        return Found(
            way=arm,
            rate=searched.rate,
            tried=searched.tried,
            trials=searched.ended,
            seeds=cells,
            planned=self.foreseen.methods[arm.name],
            planned_seconds=self.foreseen.prices.train.get(arm.name),
        )

    def _shrink(self) -> None:
        """Keep to the budget with what is known by now."""
        smaller = budget.fit(self.size, self._prices(), self.allowed, self._done())
        for text in budget.left_out(self.size, smaller):
            log.warn(f"to keep to the budget: {text}")
        self.size = smaller
        self._remember()

    def _prices(self) -> Prices:
        """What one thing costs, as measured where it was, else as foretold, at the pace that was measured."""
        foretold = self.foreseen.prices
        measured: dict[str, list[float]] = {}
        for unit, ended in self._made:
            measured.setdefault(unit.arm.name, []).append(ended.seconds / (unit.length * unit.share))
        train = {name: sum(times) / len(times) for name, times in measured.items()}
        known = [name for name in train if foretold.train.get(name)]
        pace = sum(train[name] / foretold.train[name] for name in known) / len(known) if known else 1.0
        train |= {name: pace * seconds for name, seconds in foretold.train.items() if name not in train}
        times = [ended.measuring_seconds for unit, ended in self._made if unit.is_measured and not ended.diverged]
        if times:
            tried = [ended.trying_seconds for _, ended in self._made if ended.strengths]
            strengths = sum(tried) / len(tried) if tried else 0.0
            measured_row = sum(times) / len(times) / self.size.rows
            return Prices(train, row=measured_row, strengths=strengths, has_floor=foretold.has_floor)
        return replace(foretold, train=train)

    def _done(self) -> Done:
        units = [unit for unit, _ in self._made]
        search_, whole, seeds, curve = {}, {}, {}, {}
        for arm in self.all_arms:
            mine = [unit for unit in units if unit.arm.name == arm.name]
            search_[arm.name] = sum(unit.stage in {"coarse", "fine"} for unit in mine)
            whole[arm.name] = sum(unit.stage == "whole" for unit in mine)
            seeds[arm.name] = sum(unit.stage == "final" for unit in mine)
            for share in self.asked.shares:
                curve[arm.name, share] = sum(unit.share == share for unit in mine)
        return Done(self.spent, search_, whole, seeds, curve, base=self._before is not None)

    def _base_seconds(self) -> float:
        found = self.folder.remembered("base")
        return float(found["seconds"]) if found else 0.0

    def _remembered(self) -> Size | None:
        """How much is left to be done as an earlier call decided, where the same was asked for."""
        found = self.folder.remembered("size")
        if found is None or found["asked"] != self._wish():
            return None
        size = found["size"]
        return Size(tuple(size["arms"]), size["trials"], size["seeds"], tuple(size["shares"]), size["rows"])

    def _remember(self) -> None:
        self.folder.remember("size", {"asked": self._wish(), "size": asdict(self.size)})

    def _wish(self) -> dict[str, object]:
        asked = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.asked).items()}
        return {**asked, "budget_seconds": self.allowed}


def _between(small: float, whole: float, smallest: float, share: float) -> float:
    """The rate on a part that lies between the smallest and all: on the line between both, in logarithms."""
    place = math.log(share / smallest) / math.log(1 / smallest)
    return search.rounded(small * (whole / small) ** place)
