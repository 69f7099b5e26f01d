"""What an experiment found about several ways to tune one base: `comparison.json` holds it, the page only draws it.

A cell of the experiment is one arm with one seed; arms share seeds, rows and order, so that every difference is paired
by row and by seed.
"""

from __future__ import annotations

from typing import Literal

from metier.core.evidence import Baseline, Estimate, Strength, Value

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]


class Difference(Value):
    """How much one arm differs from another on the same rows and seeds."""

    value: float
    """Mean difference, right minus left, in the measure's unit."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    narrow_low: float
    """Lower end of the narrower interval by which equivalence is judged (90 % where the other has 95 %)."""
    narrow_high: float
    """Its upper end."""
    degrees_of_freedom: float
    """Of the t distribution, after Satterthwaite."""
    rows: int
    """Test rows behind it."""
    clusters: int
    """Groups of rows that were drawn together; as many as rows where nothing groups them."""
    seeds: int
    """Seeds behind it; from one alone nothing follows for others, and the interval is of rows only."""
    p: float
    """Two-sided p value of no difference."""
    p_adjusted: float
    """The same after Holm over the secondary measures of the pair; `p` for the primary."""
    smallest_seen: float
    """Smallest true difference that an experiment of this size finds in four of five cases."""


class Pair(Value):
    """Two arms beside each other on one measure."""

    left: str
    """Name of the arm that is subtracted; "base" for the untuned model."""
    right: str
    """Name of the arm it is subtracted from."""
    measure: str
    """Key of the measure."""
    title: str
    """What a reader calls it."""
    unit: Literal["share", "nats", "ratio", "score"]
    """How it is printed."""
    higher_is_better: bool
    """Which way is good."""
    primary: bool
    """Whether it is the measure declared before the experiment."""
    difference: Difference
    """The difference, with both chances: of rows and of seeds."""
    delta: float
    """Differences below this count as none."""
    verdict: Verdict
    """What the interval says of the right arm."""
    rows_needed: int | None
    """Test rows with which an inconclusive pair would be settled at these seeds; None where rows alone do not do it."""
    seeds_needed: int | None
    """Seeds with which it would be settled on these rows; None where seeds alone do not do it."""


class Trial(Value):
    """One short training of the search for a learning rate."""

    rate: float
    """Peak learning rate of the whole training that it stands for; it was itself trained with more, for it took fewer
    steps."""
    stage: Literal["coarse", "fine", "edge"]
    """A first point of the grid, a point beside the best, or one beyond the grid's end."""
    loss: float | None
    """Validation loss at its best, with no more of the update than keeps the floor where one is set; None where it
    diverged."""
    seconds: float
    """Wall time."""


class Cell(Value):
    """One arm with one seed, on the test rows."""

    seed: int
    """Seed of new parameters, order and dropout."""
    figures: dict[str, float]
    """Every measure by its key."""
    kept: float | None
    """Share of the general ability that is kept; see `Strength.kept`. None where nothing was measured."""
    best_step: int
    """Step whose weights were kept."""
    steps: int
    """Steps taken."""
    seconds_to_best: float
    """Wall time of training until then."""
    seconds: float
    """Wall time of training in all."""
    cpu_seconds: float
    """CPU time of it, all threads."""
    peak_memory_bytes: int
    """Highest memory while training."""
    tokens_per_second: float
    """Trained tokens a second."""
    diverged: bool
    """Whether it ended without numbers; its figures are then empty."""
    strengths: tuple[Strength, ...] = ()
    """Shares of the update that were tried, where a floor was set or the paths were asked for."""


class Stability(Value):
    """How much chance of training moves an arm."""

    deviation: float
    """Standard deviation of the primary measure over seeds."""
    worst: float | None
    """Primary measure of the worst seed; None where every seed diverged."""
    diverged: float
    """Share of all its trainings, search included, that diverged."""
    sensitivity: float | None
    """Rise of the validation loss a factor of three beside the best rate; None where nothing was tried there."""


class Predicted(Value):
    """What was said of one whole training of an arm before it, and what it was."""

    seconds: float | None
    """Wall time by the plan, before anything ran; None where nobody knew."""
    seconds_by_trials: float | None = None
    """Wall time by the trials of the learning rate, a third as long each; None where there were none."""
    seconds_measured: float
    """Mean over seeds."""
    peak_memory_bytes: int | None
    """Peak by the plan, of a process that does nothing else; None where nobody knew."""
    peak_memory_bytes_by_trials: int | None = None
    """Highest of the trials; None where there were none."""
    peak_memory_bytes_measured: int
    """Highest over seeds."""


class Arm(Value):
    """One way to tune, with its own learning rate."""

    name: str
    """As given, such as "full", "lora", "lora:rank=8"."""
    title: str
    """What a reader calls it, such as "LoRA, rank 8"."""
    method: str
    """One line that says what moves."""
    learning_rate: float
    """The rate that the search chose."""
    at_edge: bool
    """Whether the best rate still lies at the end of what was tried."""
    trials: tuple[Trial, ...]
    """The search, in order."""
    cells: tuple[Cell, ...]
    """One for each seed, in the same order for every arm."""
    figures: dict[str, Estimate]
    """Every measure over rows and seeds."""
    kept: Estimate | None
    """Share of the general ability kept, over seeds."""
    stability: Stability
    """How much chance moves it."""
    parameters_moved: int
    """Numbers that training changes."""
    bytes_on_disk: int
    """Size of what must be stored to use the result."""
    seconds_to_load: float
    """Wall time to load the result onto a base in memory, or to switch to it."""
    search_seconds: float
    """Wall time of the search."""
    predicted: Predicted
    """The plan's word and the truth."""


class CurvePoint(Value):
    """One arm on a part of the training rows."""

    arm: str
    """Name of the arm."""
    share: float
    """Share of the training rows; smaller parts lie in the larger ones."""
    rows: int
    """So many rows."""
    learning_rate: float
    """The rate used there."""
    values: tuple[float, ...]
    """Primary measure of each seed."""
    estimate: Estimate
    """Over rows and seeds."""


class Guard(Value):
    """A measure against forgetting, judged where the arm without it reaches the same gain."""

    arm: str
    """Name of the arm it was added to."""
    name: str
    """Key, such as "replay"; several are joined by a plus sign."""
    title: str
    """What a reader calls it, with its strength."""
    strengths: dict[str, float]
    """How strong it was set, by key."""
    figures: dict[str, float]
    """Every measure, mean over seeds."""
    kept: float
    """Share of the general ability kept at matched gain on validation, mean over seeds; from the path of strengths."""
    kept_without: float
    """The same for the arm alone."""
    difference: Difference
    """Kept with minus kept without, at matched gain; paired by seed, and its interval holds the chance of seeds."""
    verdict: Verdict
    """Whether it moves the front: "equivalent" says that it has no effect here."""


class Way(Value):
    """One way to hold several tasks."""

    name: str
    """Key: "switched", "linear", "ties", "dare", "joint" or "sequence"."""
    title: str
    """What a reader calls it."""
    scores: tuple[tuple[Estimate, ...], ...]
    """Row i, column j: after step i of the way (the adapter of task i, or task i of the sequence), the score on task j
    over rows and seeds; one row where there is one model."""
    forgotten: tuple[float, ...]
    """For each task: how much worse it is at the end than when it was learnt, below zero where later tasks helped;
    0 where nothing came after."""
    beside_own: tuple[Pair | None, ...]
    """For each task: the way at its end beside the adapter of that task alone; None where too few rows leave nothing
    to say, and none at all for those adapters themselves."""
    seconds_to_switch: float | None
    """Wall time between two tasks in use; None where there is nothing to switch."""


class Interference(Value):
    """Several tasks on one base: what each way to hold them does to each task."""

    version: Literal[1] = 1
    """Version of this form."""
    metier: str
    """Version of metier."""
    finished: str
    """UTC time, ISO 8601."""
    command: str
    """What to type to get the same."""
    model: str
    """The recipes' `model.base`."""
    tasks: tuple[str, ...]
    """Names, in the order of training in sequence."""
    rows_train: tuple[int, ...]
    """Training rows of each task."""
    rows_measured: tuple[int, ...]
    """Test rows of each task."""
    learning_rates: tuple[float, ...]
    """Peak learning rate of each task's adapter, the same in sequence."""
    joint_learning_rate: float | None = None
    """Peak learning rate of joint training; None in files of versions in which it took the first task's."""
    seeds: tuple[int, ...]
    """Seeds of every training."""
    confidence: float
    """Coverage of every interval."""
    measure: tuple[str, ...]
    """Primary measure of each task."""
    titles: tuple[str, ...]
    """What a reader calls each of them."""
    units: tuple[Literal["share", "nats", "ratio", "score"], ...]
    """How each of them is printed."""
    higher_is_better: tuple[bool, ...]
    """Which way each of them is good."""
    base: tuple[Estimate, ...]
    """The untuned model on each task."""
    ways: tuple[Way, ...]
    """One adapter each, merges, joint training, training in sequence."""
    notes: tuple[str, ...] = ()
    """What the reader should know."""


class Told(Value):
    """One test row with the answers of the arms that are compared."""

    where: str
    """File and line."""
    prompt: str
    """What was asked."""
    reference: str
    """The answer in the data."""
    answers: dict[str, str]
    """Answer of the base and of each arm, first seed."""
    right: dict[str, bool]
    """Whether each counts as right."""


class Comparison(Value):
    """Everything an experiment found."""

    version: Literal[1] = 1
    """Version of this form."""
    metier: str
    """Version of metier."""
    finished: str
    """UTC time, ISO 8601."""
    command: str
    """What to type to get the same."""
    model: str
    """The recipe's `model.base`."""
    model_fingerprint: str
    """Hex sha256 over the base weights."""
    data_fingerprint: str
    """Hex sha256 over the rows."""
    task: str
    """Kind of the task."""
    rows_train: int
    """Training rows."""
    rows_validation: int
    """Validation rows."""
    rows_measured: int
    """Test rows that were measured, once."""
    steps: int
    """Optimizer steps of a whole training, the same for every arm; one that replays rows takes some more for them."""
    batch_size: int
    """Rows in a step, the same for every arm."""
    precision: str
    """Number format, the same for every arm."""
    seeds: tuple[int, ...]
    """Seeds of the final trainings, the same for every arm."""
    primary: str
    """Measure declared before the experiment."""
    delta: float
    """Differences of the primary measure below this count as none."""
    confidence: float
    """Coverage of every interval."""
    floor: float | None
    """Share of the general ability that had to be kept (`train.retain`); None where none was set."""
    verdict: tuple[str, ...]
    """Three sentences a busy person reads: which way, by how much, under which conditions."""
    base: dict[str, Estimate]
    """The untuned model on the test rows, by measure."""
    titles: dict[str, str]
    """What a reader calls each measure."""
    units: dict[str, Literal["share", "nats", "ratio", "score"]]
    """How each measure is printed."""
    higher_is_better: dict[str, bool]
    """Which way each measure is good."""
    groups: dict[str, Literal["domain", "retention"]]
    """What each measure says: what was gained, or what was kept."""
    baselines: tuple[Baseline, ...]
    """Cheap alternatives on the same rows."""
    arms: tuple[Arm, ...]
    """Ways to tune, in the order given."""
    pairs: tuple[Pair, ...]
    """Every arm against the base, and every arm against every earlier one; the primary measure first."""
    curve: tuple[CurvePoint, ...] = ()
    """Arms over the number of training rows."""
    guards: tuple[Guard, ...] = ()
    """Measures against forgetting."""
    told: tuple[Told, ...] = ()
    """Test rows on which the arms differ, then others."""
    budget_seconds: float | None
    """The budget that was kept to; None where none was given."""
    seconds: float
    """Wall time of it all."""
    shrunk: tuple[str, ...] = ()
    """What was left out for the budget, in the stated order, such as "2 seeds instead of 3"."""
    notes: tuple[str, ...] = ()
    """What the reader should know."""
