"""The measurement of models whose answers are numbers: the same rows, and what must not be lost, before and after.

Shapes: B rows, P targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metier.core.evidence import Answer, Baseline, Breakdown, Figure, Scatter
from metier.core.rng import derive
from metier.evaluation import value_baselines, values
from metier.evaluation.measured import Measured, Rows
from metier.evaluation.suite import estimate
from metier.tasks import predict, targets

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from metier.data.records import Record
    from metier.recipe import EvaluateSection
    from metier.tasks import ValueTask

    Array = NDArray[np.float64]

MOST_FITTED = 20_000
"""Training rows that cheap models are fitted on; more of them teach a linear model little. Judgement."""
SHOWN_ANSWERS = 12
"""Rows shown with what was measured and what was predicted."""
SHOWN_TARGETS = 8
"""Targets named for each of them."""
PREDICTED, TARGET, CHOOSING = "predicted", "target", "choosing"


@dataclass(frozen=True)
class General:
    """What the base could do before and must not lose: other rows, with the task that reads them.

    Attributes:
        name: What it is, for people.
        task: Reads the rows for the network.
        examples: The rows that are reported, encoded.
        choosing: Other such rows, by which a share of the update is chosen; none where there are too few.
        fingerprint: Tells these rows from others.
    """

    name: str
    task: ValueTask[Any]
    examples: Sequence[Any]
    choosing: Sequence[Any]
    fingerprint: str


@dataclass(frozen=True)
class Scene:
    """What is measured, the same before and after.

    Attributes:
        task: What is learnt.
        test: Test rows, encoded.
        fitted: Training rows and validation rows, encoded: cheap models choose by cross-validation and may have both.
        section: The recipe's settings.
        nouns: What a target and a row are called, such as ("protein", "cell").
        general: What must not be lost; None where nothing was named.
        seed: For draws of rows.
    """

    task: ValueTask[Any]
    test: Sequence[Any]
    fitted: tuple[Sequence[Any], ...]
    section: EvaluateSection
    nouns: tuple[str, str]
    general: General | None
    seed: int


def measure(scene: Scene, module: nn.Module, *, base: Measured | None, new: bool) -> Measured:
    """Measure one state of the network.

    Args:
        scene: What is measured.
        module: The network.
        base: The base's figures, when this is the tuned network; None when this is the base.
        new: Whether this is a base whose output was never trained: its figures would be noise and are left out.
    """
    target_BP = targets(scene.task, scene.test)
    rows: dict[str, Rows] = {}
    anchors: dict[str, Any] = {}
    notes = () if base else values.notes(target_BP, scene.task.names)
    if not new:
        predicted_BP = predict(scene.task, module, scene.test)
        rows |= values.rows_of(predicted_BP, target_BP, scene.task.names, nouns=scene.nouns)
        rows |= _drift(predicted_BP, base)
        anchors = {PREDICTED: torch.from_numpy(predicted_BP), TARGET: torch.from_numpy(target_BP)}
    if scene.general is not None:
        rows |= _general(scene.general, module, scene.nouns)
        if base is None and len(scene.general.choosing):
            anchors[CHOOSING] = torch.tensor(_error(scene.general, module), dtype=torch.float64)
    cheap = _baselines(scene, module, target_BP, new=new) if base is None and scene.section.baselines else ()
    return Measured(rows, (), anchors, cheap, notes)


def _drift(predicted_BP: Array, base: Measured | None) -> dict[str, Rows]:
    """How far the answers moved from the base's: how much was rewritten, for better or worse."""
    if base is None or PREDICTED not in base.anchors:
        return {}
    moved_B = ((predicted_BP - base.anchors[PREDICTED].numpy()) ** 2).mean(axis=1)
    title = "Drift of the answers (mean squared)"
    return {"drift": Rows(title, "retention", "distance", "score", False, moved_B, np.ones(len(moved_B)))}  # noqa: FBT003


def keeping(general: General, module: nn.Module, base: Measured) -> Callable[[], float]:
    """How to tell, again and again, what the network keeps of what its base could do, on rows that report nothing.

    Args:
        general: What must not be lost; it has rows that choose.
        module: The network.
        base: The base's figures, taken before anything was fitted or tuned.
    """
    began = float(base.anchors[CHOOSING])
    return lambda: values.error_kept(began, _error(general, module))


def _error(general: General, module: nn.Module) -> float:
    """Mean squared error on the rows that choose."""
    predicted_BP, target_BP = predict(general.task, module, general.choosing), targets(general.task, general.choosing)
    return float(np.nanmean((predicted_BP - target_BP) ** 2))


def _general(general: General, module: nn.Module, nouns: tuple[str, str]) -> dict[str, Rows]:
    """The same figures on rows that the base was made for."""
    predicted_BP, target_BP = predict(general.task, module, general.examples), targets(general.task, general.examples)
    found = values.rows_of(predicted_BP, target_BP, general.task.names, nouns=nouns)
    return {
        f"general_{name}": replace(rows, title=f"{rows.title}, {general.name}", group="retention")
        for name, rows in found.items()
        if name in {"pearson_target", "ccc_target", "rmse_target", "mse"}
    }


def fitted_alone(scene: Scene, module: nn.Module, seconds: float) -> Baseline:
    """What was fitted in closed form, before any step of tuning."""
    predicted_BP, target_BP = predict(scene.task, module, scene.test), targets(scene.task, scene.test)
    return Baseline(
        name="fitted",
        title="Fitted in closed form",
        how="the pretrained network with its output layer fitted to the training rows, before any step of tuning",
        seconds=seconds,
        figures=_figures(scene, predicted_BP, target_BP),
    )


def _figures(scene: Scene, predicted_BP: Array, target_BP: Array) -> tuple[Figure, ...]:
    found = values.rows_of(predicted_BP, target_BP, scene.task.names, nouns=scene.nouns)
    return tuple(
        Figure(name=name, estimate=estimate(name, rows, scene.section.confidence)) for name, rows in found.items()
    )


def _baselines(scene: Scene, module: nn.Module, target_BP: Array, *, new: bool) -> tuple[Baseline, ...]:
    places = [(part, i) for part in scene.fitted for i in range(len(part))]
    if len(places) > MOST_FITTED:
        drawn = np.random.default_rng(derive(scene.seed, "baselines")).permutation(len(places))[:MOST_FITTED]
        places = [places[i] for i in np.sort(drawn)]
    train = [part[i] for part, i in places]
    test = [scene.test[i] for i in range(len(scene.test))]
    known = None if new else (predict(scene.task, module, train), predict(scene.task, module, test))
    return value_baselines.measure(
        _features(scene.task, train),
        targets(scene.task, train),
        _features(scene.task, test),
        lambda predicted_BP: _figures(scene, predicted_BP, target_BP),
        zero_shot=known,
        seed=scene.seed,
    )


def _features(task: ValueTask[Any], examples: Sequence[Any]) -> Any:
    found = task.features([getattr(example, "content", example) for example in examples])
    return np.empty((len(examples), 0)) if found is None else found


def breakdowns(scene: Scene, after: Measured, records: Sequence[Record]) -> tuple[Breakdown, ...]:
    """The tuned network's figures by target and by group of rows."""
    predicted_BP, target_BP = _answers(after)
    groups = scene.task.groups(records)
    return values.by_group(
        predicted_BP, target_BP, groups, scene.task.names, scene.section.confidence, noun=scene.nouns[0]
    )


def scatters(scene: Scene, after: Measured) -> tuple[Scatter, ...]:
    """Points of every target."""
    return values.scatter_sample(*_answers(after), scene.task.names, seed=scene.seed)


def side_by_side(scene: Scene, before: Measured, after: Measured) -> tuple[Answer, ...]:
    """A few rows with what was measured, what the base said and what the tuned network says."""
    predicted_BP, target_BP = _answers(after)
    was_BP = before.anchors[PREDICTED].numpy() if PREDICTED in before.anchors else None
    made = []
    for row in np.linspace(0, len(target_BP) - 1, min(SHOWN_ANSWERS, len(target_BP))).round().astype(int):
        seen = [i for i in range(len(scene.task.names)) if not np.isnan(target_BP[row, i])]
        most = sorted(seen, key=lambda i: -abs(target_BP[row, i]))[:SHOWN_TARGETS]
        shown = scene.task.show(scene.test[int(row)])
        made.append(
            Answer(
                where=shown.where,
                prompt=shown.parts[0][0].removesuffix(" -> "),
                reference=_told(scene.task.names, target_BP[row], most),
                before=None if was_BP is None else _told(scene.task.names, was_BP[row], most),
                after=_told(scene.task.names, predicted_BP[row], most),
                before_right=None,
                after_right=None,
            )
        )
    return tuple(made)


def _told(names: Sequence[str], values_P: Array, chosen: Sequence[int]) -> str:
    return ", ".join(f"{names[i]} {values_P[i]:.2f}" for i in chosen)


def _answers(after: Measured) -> tuple[Array, Array]:
    return after.anchors[PREDICTED].numpy(), after.anchors[TARGET].numpy()


def primary(measured: Mapping[str, Rows], names: Sequence[str]) -> str:
    """The figure that decides: the mean correlation of three targets or more, else the squared error."""
    return "pearson_target" if len(names) >= values.LEAST_VALUES and "pearson_target" in measured else "mse"


def declared(scene: Scene) -> str:
    """The figure that will decide, told from what was measured alone."""
    target_BP = targets(scene.task, scene.test)
    perfect = values.rows_of(np.nan_to_num(target_BP), target_BP, scene.task.names, nouns=scene.nouns)
    return primary(perfect, scene.task.names)
