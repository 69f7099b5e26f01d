"""Jobs whose answers are numbers: cells, and tasks of a user's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metier import data, models, planning, tasks
from metier.core import DataError, RecipeError
from metier.core.files import sha256
from metier.core.panel import Panel
from metier.core.rng import derive
from metier.data.cells import Transform, check_ids, overlap, read_cells
from metier.data.records import Cells
from metier.evaluation import value_suite
from metier.recipe import CellsTask, FullMethod, LoRAMethod
from metier.run.cell_data import cells_of, read_splits, same_cells, without_annotations
from metier.run.folder import RunFolder
from metier.run.job import SPLITS, Job, encode_splits, measured_rows
from metier.tasks.cells import CellTask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from metier.core.evidence import Answer, Baseline, Breakdown, Scatter
    from metier.data.cells import CellTable
    from metier.data.records import Record, Splits
    from metier.evaluation import Measured
    from metier.models import Model
    from metier.planning import Plan
    from metier.recipe import OwnTask, Recipe
    from metier.tasks import ValueTask

CELL_FILES = (".h5mu", ".h5ad")
MOST_GENERAL = 1000
"""Cells of the pretraining set on which forgetting is measured; more would only narrow the interval. Judgement."""
MOST_CHOOSING = 200
"""Further such cells, by which a share of the update is chosen where a floor is set. Judgement."""


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

    @property
    def network(self) -> str:
        """Names and sizes of its tensors."""
        return repr([(name, tuple(p.shape)) for name, p in self.model.module.named_parameters()])

    def load(self) -> Model:
        """The network."""
        return self.model

    def redrawn(self, model: Model) -> Mapping[str, Tensor]:
        """What is new, as building the network anew draws it."""
        section, seed = self.recipe.model, self.recipe.train.seed
        again = (
            models.load_own(section, seed) if self.panel is None else models.load_cells(section, self.panel, seed=seed)
        )
        return {name: again.module.get_parameter(name).detach() for name in model.new}

    def part(self, rows: Sequence[int]) -> Job:
        """The same job on some of its training rows, from which alone cheap models and closed forms then learn."""
        found = super().part(rows)
        fitted = (found.train, *self.scene.fitted[1:])
        return replace(self, train=found.train, scene=replace(self.scene, fitted=fitted))

    def identity(self, model: Model) -> Mapping[str, Any]:  # noqa: ARG002
        """What must not be lost, and the user's own code and files, which no fingerprint of weights tells."""
        section, task, general = self.recipe.model, self.recipe.task, self.scene.general
        theirs = [section.use, getattr(task, "use", None)]
        return {
            "general": None if general is None else general.fingerprint,
            "network": [section.use, section.arguments],
            "code": {use: models.source_digest(use) for use in theirs if use},
            "files": _digests({**section.arguments, **getattr(task, "arguments", {})}),
        }

    def measure(self, model: Model, module: nn.Module, *, base: Measured | None) -> Measured:  # noqa: ARG002
        """Correlation, concordance and error on the same rows."""
        return value_suite.measure(self.scene, module, base=base, new=base is None and is_new(self))

    def primary(self, after: Measured) -> str:
        """Correlation of several targets, else the error."""
        return value_suite.primary(after.rows, self.task.names)

    def declared(self) -> str:
        """Correlation of several targets, where they vary, else the error."""
        return value_suite.declared(self.scene)

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
        """Parameters and memory, activations counted on a few rows; time only a run or a probe can tell."""
        rows = [self.train[i] for i in range(min(len(self.train), planning.LOOKED_AT))]
        module = self.model.module
        kept = planning.saved_bytes(module, lambda: self.task.loss(module, self.task.collate(rows)).total_B)
        return planning.plan_any(
            module,
            self.recipe,
            sizes=self.sizes(),
            whole=(*self.model.new, *self.model.whole),
            kept_bytes=kept / self.task.read(rows),
        )

    @property
    def scratch(self) -> bool:
        """Whether every parameter is new."""
        return models.is_blank(self.model)

    @property
    def fits(self) -> bool:
        """Whether the network may have a closed form; scTranslator, which is large, has none."""
        return not isinstance(self.model.module, models.ScTranslator)

    def calibrate(self, model: Model) -> tuple[str, ...]:
        """Fit the output layer in closed form, where task and network offer it.

        Validation rows are fitted as well: the closed form chooses its strengths by cross-validation of its own, and
        what is then kept only if no step of tuning is better on these rows is judged all the more strictly.
        """
        rows = [part[i] for part in self.scene.fitted for i in range(len(part))]
        return self.task.calibrate(model.module, rows, derive(self.recipe.train.seed, "calibrate"))

    def fitted_alone(self, module: nn.Module, seconds: float) -> tuple[Baseline, ...]:
        """The fitted network on the test rows; nothing where nothing is pretrained, and so nothing is tuned."""
        return () if self.scratch else (value_suite.fitted_alone(self.scene, module, seconds),)

    def whole(self, module: nn.Module) -> nn.Module:
        """The network with the rows that were in use put back among the others."""
        if self.original is None or not isinstance(module, models.ScTranslator):
            return module
        return module.merged_into(self.original)

    @property
    def keeps(self) -> bool:
        """Whether there are cells that the base was made for, and enough to choose by some of them."""
        return self.scene.general is not None and len(self.scene.general.choosing) > 0

    def keeping(self, model: Model, module: nn.Module, before: Measured) -> Callable[[], float]:
        """By the error on cells that the base was made for and that report nothing; the base is the unfitted one."""
        if self.scene.general is None:
            return super().keeping(model, module, before)
        return value_suite.keeping(self.scene.general, module, before)

    def facts(self) -> Mapping[str, Any]:
        """The panel that the network was tuned on."""
        return {} if self.panel is None else {"panel": asdict(self.panel)}


def _digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Content of the files that arguments name."""
    named = [Path(value) for value in arguments.values() if isinstance(value, str)]
    return {str(path): sha256(path) for path in named if path.is_file()}


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
    if recipe.evaluate.retention != "off" and not recipe.evaluate.retention.startswith("neutral"):
        what = "what a network of your own may lose is not measured"
        raise RecipeError(what, where="evaluate.retention", hint="leave it out; evaluate the run on a file of its own")
    task = tasks.build_own(section)
    splits = data.read(recipe.data, accepts=data.formats_for("own"))
    model = models.load_own(recipe.model, recipe.train.seed)
    found = encode_splits(task, splits)
    tasks.rehearse(task, model.module, found["train"], splits.train)
    _check_targets(task, found)
    test = measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed)
    scene = _scene(recipe, task, found, test, ("target", "row"), None)
    return _job(recipe, task, splits, found, test, model, scene, splits.notes)


def _check_targets(task: ValueTask[Any], found: Mapping[str, Sequence[Any]]) -> None:
    """Every split must have something measured, and nothing infinite.

    Raises:
        DataError: If one has not.
    """
    for name, examples in found.items():
        target_BP = tasks.targets(task, examples)
        if np.isinf(target_BP).any():
            row = int(np.isinf(target_BP).any(axis=1).argmax())
            what = "a target is infinite"
            raise DataError(what, where=examples[row].where, hint="use NaN for what was not measured")
        if np.isnan(target_BP).all():
            raise DataError(f"no {name} row has a measured target", where="data", hint="check what `batch` returns")


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
    kept = _general(recipe, section, model)
    splits = replace(splits, notes=(*splits.notes, *_retargeted(model.module, task)))
    general = kept if isinstance(kept, value_suite.General) else None
    more = [*_seen_before(recipe, splits), *([kept] if isinstance(kept, str) else [])]
    scene = _scene(recipe, task, found, test, ("protein", "cell"), general)
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


def _retargeted(network: Any, task: CellTask) -> list[str]:
    """Tell the network what it is now taught; a warning where it was taught something else."""
    before, now = models.usual_transform(network), task.transform.name
    models.retarget(network, now)
    if before == now or not models.known_proteins(network, task.panel):
        return []
    return [f"the base predicts {before} values, the task learns {now}: its figures before are on another scale"]


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
    if isinstance(network, models.ScTranslator):
        check_ids(table.panel, at_least=section.overlap, where=table.where)
    vocabulary = models.known_genes(network)
    if not vocabulary:
        return []
    return [overlap(table.panel, vocabulary, at_least=section.overlap, where=table.where)]


def _general(recipe: Recipe, section: CellsTask, model: Model) -> value_suite.General | str | None:
    """The cells that the base was made for: those that the recipe names, or the base's own test cells.

    A sentence says why there are none; None where nothing can be lost, or nobody wants to know.

    Raises:
        MetierError: If the file that the recipe names cannot be read or has no protein that the network knows.
    """
    told, known_from_here = recipe.evaluate.retention, _cells_of_base(recipe)
    if told == "off" or models.is_blank(model):
        return None
    if Path(told).suffix in CELL_FILES:
        table = read_cells(told, columns=without_annotations(recipe.data.columns), organism=section.organism)
        (choosing, cells), name = _parted(table, recipe.data.seed), Path(told).stem
    elif not told.startswith("neutral"):
        raise RecipeError(f"{told!r} is no set of cells", where="evaluate.retention", hint="name an h5mu file, or off")
    elif known_from_here is None:
        hint = "name the cells it was pretrained on with evaluate.retention=FILE.h5mu"
        return f"retention is not measured: {recipe.model.base} does not say what it was pretrained on; {hint}"
    else:
        choosing, cells = (cells_of(part) for part in (known_from_here.validation, known_from_here.test))
        name = "pretraining set"
    known = models.known_proteins(model.module, cells.table.panel)
    if not known or not cells.table.measured:
        raise DataError("has no protein that the network knows", where=told, hint="name another set, or off")
    # On its own scale, whatever scale the new targets have.
    own = section.model_copy(update={"transform": "auto"})
    task = cell_task(own, model.module, cells.table.panel.only(known), seed=recipe.train.seed)
    told_by, chosen_by = (
        task.encode(measured_rows(part, most, recipe.data.seed), training=False)
        for part, most in ((cells, MOST_GENERAL), (choosing, MOST_CHOOSING))
    )
    fingerprint = f"{cells.table.fingerprint()} {len(cells)} {recipe.data.seed}"
    return value_suite.General(name, task, told_by, chosen_by, fingerprint)


def _parted(table: CellTable, seed: int) -> tuple[Cells, Cells]:
    """A fifth of a table's cells, at most as many as are needed, by which a strength is chosen, and the others."""
    drawn = np.random.default_rng(derive(seed, "choosing")).permutation(len(table))
    first = min(MOST_CHOOSING, len(table) // 5)
    return Cells(table, np.sort(drawn[:first])), Cells(table, np.sort(drawn[first:]))


def _cells_of_base(recipe: Recipe) -> Splits | None:
    """The cells of the run that the base comes from, where it is one and its data are still there."""
    run = RunFolder(Path(recipe.model.base).expanduser())
    if not run.resolved.is_file():
        return None
    before = run.recipe()
    if not isinstance(before.task, CellsTask) or not Path(before.data.train).is_file():
        return None
    return read_splits(before, before.task)


def _seen_before(recipe: Recipe, splits: Splits) -> list[str]:
    """A warning where the base was pretrained on cells that now judge, or is judged on cells that now teach."""
    before = _cells_of_base(recipe)
    if before is None:
        return []
    pairs = (
        ("test cells were among those that the base learnt from: its figures flatter it", splits.test, before.train),
        ("training cells are among those on which forgetting is measured: it looks smaller", splits.train, before.test),
    )
    return [
        f"{number:,} {what}"
        for what, one, other in pairs
        if (number := len(same_cells(cells_of(one), cells_of(other))))
    ]


def _scene(
    recipe: Recipe,
    task: ValueTask[Any],
    found: Mapping[str, Sequence[Any]],
    test: Sequence[Record],
    nouns: tuple[str, str],
    general: value_suite.General | None,
) -> value_suite.Scene:
    return value_suite.Scene(
        task=task,
        test=task.encode(test, training=False),
        fitted=fitted_rows(found),
        section=recipe.evaluate,
        nouns=nouns,
        general=general,
        seed=recipe.data.seed,
    )


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
