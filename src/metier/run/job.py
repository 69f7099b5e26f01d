"""From a recipe to all that can be known before anything expensive begins: the half in which mistakes are caught."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import adapt, planning, tasks
from metier.core import DataError, Fault, RecipeError, log
from metier.core.lazily import Made
from metier.core.rng import derive, seed_everything

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from metier.adapt import Adapted
    from metier.core.evidence import Answer, Baseline, Breakdown, Scatter
    from metier.data.records import Record, Splits
    from metier.evaluation import Measured
    from metier.models import Head, Model
    from metier.planning import Plan
    from metier.recipe import Recipe, TrainSection
    from metier.tasks import Shown, Task
    from metier.training import Precision


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Job(ABC):
    """A checked recipe and its encoded rows; what the story asks of it differs between text and numbers.

    Attributes:
        recipe: As resolved.
        head: The head that the task needs.
        labels: The classes, for classification.
        task: What is learnt.
        splits: The rows.
        train: Encoded training rows.
        validation: Encoded validation rows.
        test: The test rows that will be measured.
        notes: What the user should know.
    """

    recipe: Recipe
    head: Head
    labels: tuple[str, ...]
    task: Task[Any]
    splits: Splits
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Record]
    notes: tuple[str, ...]

    def shown(self, count: int = 3) -> list[Shown]:
        """Training examples as the model meets them."""
        return [self.task.show(self.train[i]) for i in range(min(count, len(self.train)))]

    def sizes(self) -> Sequence[int]:
        """What each training example costs, in tokens."""
        return tasks.sizes(self.task, self.train)

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Numbers in the network."""

    @property
    @abstractmethod
    def network(self) -> str:
        """What the network is made of: the same words for networks that take the same memory and time."""

    @abstractmethod
    def load(self) -> Model:
        """The pretrained model, in float32 on the CPU."""

    @abstractmethod
    def identity(self, model: Model) -> Mapping[str, Any]:
        """What, beside recipe, rows and base, decides the base's figures."""

    @abstractmethod
    def measure(self, model: Model, module: nn.Module, *, base: Measured | None) -> Measured:
        """The figures of one state of the network: of the base where `base` is None, else of the tuned one."""

    @abstractmethod
    def primary(self, after: Measured) -> str:
        """Name of the figure that decides."""

    @abstractmethod
    def declared(self) -> str:
        """Name of the figure that will decide, told from the test rows before anything is measured."""

    @abstractmethod
    def answers(self, before: Measured, after: Measured, primary: str) -> tuple[Answer, ...]:
        """Test rows with the answers of both."""

    @abstractmethod
    def plan(self, *, flops_per_second: float | None) -> Plan:
        """What the job would take, by formula."""

    @abstractmethod
    def redrawn(self, model: Model) -> Mapping[str, Tensor]:
        """The parameters that no checkpoint holds, as the recipe's own seed draws them, for a model that is loaded."""

    def part(self, rows: Sequence[int]) -> Job:
        """The same job on some of its training rows, by index into `train`."""
        return replace(self, train=Part(self.train, rows))

    def rehearsing(self) -> Job:
        """The job with the general rows that its recipe mixes among those that are learnt.

        Raises:
            RecipeError: If the task has no such rows.
        """
        if self.recipe.data.replay is not None:
            raise nothing_to_rehearse(self.recipe)
        return self

    @property
    def keeps(self) -> bool:
        """Whether something tells what is kept of the general ability, see `keeping`."""
        return False

    def prompted(self, model: Model) -> tuple[Baseline, ...]:  # noqa: ARG002 - for jobs whose base can be asked
        """Cheap alternatives for which the base must answer every test row once more, which comparisons are worth."""
        return ()

    @property
    def scratch(self) -> bool:
        """Whether nothing is pretrained."""
        return False

    @property
    def fits(self) -> bool:
        """Whether something may be fitted in closed form before tuning."""
        return False

    def calibrate(self, model: Model) -> tuple[str, ...]:  # noqa: ARG002 - for jobs that can
        """Fit in closed form, in place, what can be so fitted before tuning; what was done, as sentences."""
        return ()

    def fitted_alone(self, module: nn.Module, seconds: float) -> tuple[Baseline, ...]:  # noqa: ARG002
        """What the closed form reaches before any step of tuning, to stand beside the cheap alternatives."""
        return ()

    def whole(self, module: nn.Module) -> nn.Module:
        """What is saved of a fully tuned network: the same, unless training held only the part that it uses."""
        return module

    def breakdowns(self, after: Measured) -> tuple[Breakdown, ...]:  # noqa: ARG002
        """The tuned model's figures by target and by group of rows."""
        return ()

    def scatters(self, after: Measured) -> tuple[Scatter, ...]:  # noqa: ARG002
        """Measured and predicted values for a figure."""
        return ()

    def keeping(self, model: Model, module: nn.Module, before: Measured) -> Callable[[], float]:  # noqa: ARG002
        """How to tell what is kept of the general ability that the base has; to be called before the network moves.

        Args:
            model: As loaded.
            module: Its network, adapted.
            before: The base's figures.

        Raises:
            RecipeError: If nothing says so for this kind of task; preparing has refused that already.
        """
        raise nothing_kept(self.recipe)

    def facts(self) -> Mapping[str, Any]:
        """What whoever loads the result must know beside the recipe."""
        return {}


class Part(Made[Any]):
    """Some of the examples, in the order of the whole."""

    def __init__(self, whole: Sequence[Any], rows: Sequence[int]) -> None:
        """Take the whole, and the places of those that are left."""
        self._whole, self._rows = whole, sorted(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def make(self, place: int) -> Any:
        """The example at a place."""
        return self._whole[self._rows[place]]


def nothing_kept(recipe: Recipe) -> RecipeError:
    """What a user is told who sets a floor where nothing says what is kept."""
    return RecipeError(
        f"nothing tells what a model for {recipe.task.kind} must keep, so no share of it can be promised",
        where="train.retain",
        hint="leave train.retain out; it is for language models, encoders and cells, with evaluate.retention not off",
    )


def nothing_to_rehearse(recipe: Recipe) -> RecipeError:
    """What a user is told who wants general rows mixed into a task that has none."""
    return RecipeError(
        f"general rows cannot be mixed into the task {recipe.task.kind}",
        where="data.replay",
        hint="leave it out, or put such rows into data.train yourself",
    )


def measured_rows(test: Sequence[Record], most: int | None, seed: int) -> tuple[Record, ...]:
    """The test rows that are measured: all, or `most` drawn with the seed, in file order."""
    if most is None or len(test) <= most:
        return tuple(test)
    chosen = random.Random(derive(seed, "measured")).sample(range(len(test)), most)  # noqa: S311
    return tuple(test[i] for i in sorted(chosen))


def encode_splits(task: Task[Any], splits: Splits) -> dict[str, Sequence[Any]]:
    """Encode all splits, so that a row that cannot be learnt or measured is found now.

    Raises:
        DataError: With the faults of every split together.
    """
    found: dict[str, Sequence[Any]] = {}
    faults: list[Fault] = []
    for name in SPLITS:
        try:
            found[name] = task.encode(getattr(splits, name), training=name == "train")
        except DataError as error:
            # What is wrong with the task and not with a row comes with the first row of every split.
            said = {fault.what for fault in faults}
            faults += [fault for fault in error.faults if len(error.faults) > 1 or fault.what not in said]
    if faults:
        raise DataError.of(faults)
    return found


def check_machine(recipe: Recipe) -> None:
    """Refuse now what this machine does not have.

    Raises:
        RecipeError: For each thing that is lacking.
    """
    import torch

    name, number = recipe.model.device.partition(":")[::2]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    faults = []
    if name == "cuda" and int(number or 0) >= gpus:
        what = f"there is no GPU {number or 0} here, but {gpus}" if gpus else "there is no CUDA GPU that torch can use"
        faults.append(Fault("model.device", what, "set it to auto or cpu, or install torch for CUDA"))
    if name == "mps" and not torch.backends.mps.is_available():
        faults.append(Fault("model.device", "there is no Apple GPU that torch can use", "set it to auto or cpu"))
    if recipe.train.optimizer.states == "int8" and (name in {"cpu", "mps"} or not gpus):
        faults.append(Fault("train.optimizer.states", "8-bit states need a CUDA device", "set it to fp32"))
    if recipe.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        faults.append(Fault("model.attention", "the package flash_attn is not installed", "set it to auto"))
    if faults:
        raise RecipeError.of(faults)


UNUSUAL_RATE = 30.0
"""Times the usual rate from which the user is told; searches for a rate rarely go further. Judgement."""


def doubts(job: Job) -> tuple[str, ...]:
    """What the recipe asks for that can be done, and hardly can be meant."""
    section, rows = job.recipe.train, len(job.train)
    told = []
    if section.learning_rate == 0:
        told.append("train.learning_rate is 0: nothing will be learnt")
    elif section.learning_rate != "auto":
        usual, _ = learning_rate(job, section.model_copy(update={"learning_rate": "auto"}))
        if section.learning_rate > UNUSUAL_RATE * usual:
            told.append(
                f"train.learning_rate is {section.learning_rate:g}, {section.learning_rate / usual:,.0f} times the "
                f"usual {usual:g} for this method and size: the run may diverge"
            )
    if section.batch_size > rows:
        told.append(
            f"train.batch_size is {section.batch_size}, but there are {rows} training examples: a step takes all"
        )
    return tuple(told)


def choose_device(recipe: Recipe) -> torch.device:
    """The device that the recipe means; also sets the number of CPU threads."""
    import torch

    if recipe.model.threads is not None:
        torch.set_num_threads(recipe.model.threads)
    if recipe.model.device != "auto":
        return torch.device(recipe.model.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_ready(job: Job, model: Model, precision: Precision) -> Adapted:
    """The model's placed network made ready for the recipe's method: new numbers are drawn by the recipe's seed."""
    recipe = job.recipe
    seed_everything(derive(recipe.train.seed, "adapt"))
    made = adapt.adapt(
        model.module,
        recipe.method,
        head=job.head,
        base_name=model.lineage.reference,
        new=(*model.new, *model.whole),
    )
    precision.follow(made.module)
    return made


def learning_rate(job: Job, section: TrainSection | None = None) -> tuple[float, str]:
    """The peak rate and why; `section` stands for the recipe's own where it is given."""
    recipe = job.recipe
    section = section or recipe.train
    if section.learning_rate != "auto":
        return section.learning_rate, "set in the recipe"
    steps = section.total_steps(len(job.train))
    return planning.learning_rate(
        recipe.method,
        head=job.head,
        parameters=job.parameters,
        steps=steps,
        task_kind=recipe.task.kind,
        scratch=job.scratch,
    )


def say(job: Job) -> None:
    """Tell the user what was seen."""
    splits = job.splits
    log.note(
        f"{Path(job.recipe.data.train).name}: {splits.reason}; {len(splits.train)} training, "
        f"{len(splits.validation)} validation, {len(splits.test)} test rows",
        format=splits.format,
    )
    for text in splits.facts:
        log.note(text)
    for text in job.notes:
        log.warn(text)
