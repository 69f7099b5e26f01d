"""Jobs whose answers are numbers: cells, and tasks of a user's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metier import data, models, planning, tasks
from metier.core import DataError, Fault, MetierError, RecipeError
from metier.core.panel import Panel
from metier.core.rng import derive
from metier.data.cells import Transform, overlap, read_cells
from metier.data.records import Cells
from metier.evaluation import value_suite
from metier.recipe import CellsTask, FullMethod, LoRAMethod
from metier.run.cell_data import read_splits
from metier.run.folder import RunFolder
from metier.run.job import Job, measured_rows
from metier.tasks.cells import CellTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from metier.core.evidence import Answer, Breakdown, Scatter
    from metier.data.cells import CellTable
    from metier.data.records import Record, Splits
    from metier.evaluation import Measured
    from metier.models import Model
    from metier.planning import Plan
    from metier.recipe import OwnTask, Recipe
    from metier.tasks import ValueTask

CELL_FILES = (".h5mu", ".h5ad")
SPLITS = ("train", "validation", "test")
MOST_GENERAL = 1000
"""Cells of the pretraining set on which forgetting is measured; more would only narrow the interval. Judgement."""


@dataclass(frozen=True)
class ValueJob(Job):
    """A job whose answers are numbers.

    Attributes:
        model: The network, loaded already: only the network itself knows what it can read.
        scene: What is measured.
        panel: Genes and proteins, for cells.
        original: The network of which `model` holds only the rows in use; None where it holds all.
    """

    task: ValueTask[Any]
    model: Model
    scene: value_suite.Scene
    panel: Panel | None = None
    original: models.ScTranslator | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the network."""
        return sum(parameter.numel() for parameter in self.model.module.parameters())

    def load(self) -> Model:
        """The network."""
        return self.model

    def identity(self, model: Model) -> Mapping[str, Any]:  # noqa: ARG002
        """What must not be lost, and the network's own code, which no fingerprint of weights tells."""
        section = self.recipe.model
        general = self.scene.general
        return {
            "general": None if general is None else [general.name, len(general.examples)],
            "network": [section.use, section.arguments],
        }

    def measure(self, model: Model, module: nn.Module, *, base: Measured | None) -> Measured:  # noqa: ARG002
        """Correlation, concordance and error on the same rows."""
        return value_suite.measure(self.scene, module, base=base, new=base is None and is_new(self))

    def primary(self, after: Measured) -> str:
        """Correlation of several targets, else the error."""
        return value_suite.primary(after.rows, self.task.names)

    def answers(self, before: Measured, after: Measured, primary: str) -> tuple[Answer, ...]:  # noqa: ARG002
        """Some rows, measured and predicted."""
        return value_suite.side_by_side(self.scene, before, after)

    def breakdowns(self, after: Measured) -> tuple[Breakdown, ...]:
        """By target and by group."""
        return value_suite.breakdowns(self.scene, after, self.test)

    def scatters(self, after: Measured) -> tuple[Scatter, ...]:
        """Points of every target."""
        return value_suite.scatters(self.scene, after)

    def plan(self, *, flops_per_second: float | None) -> Plan:  # noqa: ARG002 - no formula knows any network's work
        """Parameters, and memory for them; what activations and time take only a probe can tell."""
        sizes = [self.task.size(self.train[i]) for i in range(len(self.train))]
        whole = (*self.model.new, *self.model.whole)
        return planning.plan_any(self.model.module, self.recipe, sizes=sizes, whole=whole)

    @property
    def scratch(self) -> bool:
        """Whether every parameter is new."""
        return len(self.model.new) == sum(1 for _ in self.model.module.parameters())

    @property
    def fits(self) -> bool:
        """The networks are small, and some have a closed form."""
        return True

    def calibrate(self, model: Model) -> tuple[str, ...]:
        """Fit the output layer in closed form, where task and network offer it.

        Validation rows are fitted as well: the closed form chooses its strengths by cross-validation of its own, and
        what is then kept only if no step of tuning is better on these rows is judged all the more strictly.
        """
        rows = [part[i] for part in self.scene.fitted for i in range(len(part))]
        return self.task.calibrate(model.module, rows, derive(self.recipe.train.seed, "calibrate"))

    def whole(self, module: nn.Module) -> nn.Module:
        """The network with the rows that were in use put back among the others."""
        if self.original is None or not isinstance(module, models.ScTranslator):
            return module
        return module.merged_into(self.original)

    def facts(self) -> Mapping[str, Any]:
        """The panel that the network was tuned on."""
        return {} if self.panel is None else {"panel": asdict(self.panel)}


def is_new(job: ValueJob) -> bool:
    """Whether the network's output was never trained on any of the targets: its answers would be noise."""
    if job.panel is not None:
        return not models.known_proteins(job.model.module, job.panel)
    return bool(job.model.new)


def prepare_own(recipe: Recipe, section: OwnTask) -> ValueJob:
    """Read the rows, build the task and the network.

    Raises:
        MetierError: With every fault that was found.
    """
    task = tasks.build_own(section)
    splits = data.read(recipe.data, accepts=data.formats_for("own"))
    model = models.load_own(recipe.model, recipe.train.seed)
    found: dict[str, Sequence[Any]] = {}
    faults: list[Fault] = []
    for name in SPLITS:
        try:
            found[name] = task.encode(getattr(splits, name), training=name == "train")
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError.of(faults)
    test = measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed)
    scene = value_suite.Scene(
        task=task,
        test=task.encode(test, training=False),
        fitted=fitted_rows(found),
        section=recipe.evaluate,
        nouns=("target", "row"),
        general=None,
        seed=recipe.data.seed,
    )
    return _job(recipe, task, splits, found, test, model, scene, splits.notes)


def prepare_cells(recipe: Recipe, section: CellsTask) -> ValueJob:
    """Read and join the tables, load the network, and bind both.

    Raises:
        MetierError: With every fault that was found, the tables' first.
    """
    splits = read_splits(recipe, section)
    table: CellTable = splits.train.table  # type: ignore[attr-defined]
    model = models.load_cells(recipe.model, table.panel, seed=recipe.train.seed, redraw=section.redraw)
    _check_export(recipe, model.module)
    task = cell_task(section, model.module, table.panel, seed=recipe.train.seed)
    splits = replace(splits, facts=(*splits.facts, *_known(section, model.module, table)))
    found = {name: task.encode(getattr(splits, name), training=name == "train") for name in SPLITS}
    test = measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed)
    general, more = _general(recipe, section, model)
    scene = value_suite.Scene(
        task=task,
        test=task.encode(test, training=False),
        fitted=fitted_rows(found),
        section=recipe.evaluate,
        nouns=("protein", "cell"),
        general=general,
        seed=recipe.data.seed,
    )
    job = _job(recipe, task, splits, found, test, model, scene, [*splits.notes, *more], table.panel)
    return _in_use(job) if isinstance(recipe.method, FullMethod) else job


def _in_use(job: ValueJob) -> ValueJob:
    """For scTranslator, only the rows of its embeddings that its panels use: the others never get a gradient."""
    network = job.model.module
    if not isinstance(network, models.ScTranslator):
        return job
    bound = [task for task in (job.task, job.scene.general and job.scene.general.task) if isinstance(task, CellTask)]
    small = network.restricted(frozenset().union(*(ids for task in bound for ids in task.ids())))
    return replace(job, model=job.model.with_module(small), original=network)


def fitted_rows(found: Mapping[str, Sequence[Any]]) -> tuple[Sequence[Any], ...]:
    """What cheap models may learn from: all that teaches and chooses, where it stands in one table."""
    tables = {getattr(found[name], "table", None) for name in ("train", "validation")}
    return (found["train"], found["validation"]) if len(tables) == 1 else (found["train"],)


def cell_task(section: CellsTask, network: Any, panel: Panel, *, seed: int) -> CellTask:
    """The task for one network and panel."""
    name = models.usual_transform(network) if section.transform == "auto" else section.transform
    if isinstance(network, models.ScTranslator):
        return CellTask(section, panel, lambda p: network.reader(p, longer=section.longer, seed=seed), Transform(name))
    return CellTask(section, panel, network.reader, Transform(name))


def _check_export(recipe: Recipe, network: Any) -> None:
    """The original layout must exist, and there must be a whole network to write in it.

    Raises:
        RecipeError: If not.
    """
    if not recipe.export.original:
        return
    if not isinstance(network, models.ScTranslator):
        what = "only scTranslator has an original layout"
        raise RecipeError(what, where="export.original", hint="leave it out")
    if isinstance(recipe.method, LoRAMethod) and not recipe.export.merge:
        what = "an adapter alone has no original layout"
        raise RecipeError(what, where="export.original", hint="set export.merge=true as well")


def _known(section: CellsTask, network: Any, table: CellTable) -> list[str]:
    """How many genes the network knows.

    Raises:
        DataError: If too few.
    """
    vocabulary = models.known_genes(network)
    if not vocabulary:
        return []
    return [overlap(table.panel, vocabulary, at_least=section.overlap, where=table.where)]


def _general(recipe: Recipe, section: CellsTask, model: Model) -> tuple[value_suite.General | None, list[str]]:
    """The cells that the base was made for: a file that the recipe names, or the test cells of the base's own run."""
    told = recipe.evaluate.retention
    if told == "off" or model.new == tuple(name for name, _ in model.module.named_parameters()):
        return None, []
    try:
        cells, name = _cells_of_file(told, section) if Path(told).suffix in CELL_FILES else _cells_of_run(recipe)
    except MetierError as error:
        return None, [f"retention is not measured: {error}"]
    if cells is None:
        hint = "name the cells it was pretrained on with evaluate.retention=FILE.h5mu"
        return None, [f"retention is not measured: {recipe.model.base} does not say what it was pretrained on; {hint}"]
    known = models.known_proteins(model.module, cells.table.panel)
    panel = cells.table.panel.only(known)
    task = cell_task(section, model.module, panel, seed=recipe.train.seed)
    chosen = measured_rows(cells, MOST_GENERAL, recipe.data.seed)
    return value_suite.General(name, task, task.encode(chosen, training=False)), []


def _cells_of_file(file: str, section: CellsTask) -> tuple[Cells | None, str]:
    table = read_cells(file, organism=section.organism)
    return Cells(table, np.arange(len(table))), Path(file).stem


def _cells_of_run(recipe: Recipe) -> tuple[Cells | None, str]:
    run = RunFolder(Path(recipe.model.base).expanduser())
    if not run.resolved.is_file():
        return None, ""
    before = run.recipe()
    if not isinstance(before.task, CellsTask) or not Path(before.data.train).is_file():
        return None, ""
    splits = read_splits(before, before.task)
    return splits.test, "pretraining set"  # type: ignore[return-value]


def _job(
    recipe: Recipe,
    task: ValueTask[Any],
    splits: Splits,
    found: Mapping[str, Sequence[Any]],
    test: Sequence[Record],
    model: Model,
    scene: value_suite.Scene,
    notes: Sequence[str],
    panel: Panel | None = None,
) -> ValueJob:
    return ValueJob(
        recipe=recipe,
        head="values",
        labels=(),
        task=task,
        splits=splits,
        train=found["train"],
        validation=found["validation"],
        test=test,
        notes=tuple(notes),
        model=model,
        scene=scene,
        panel=panel,
    )
