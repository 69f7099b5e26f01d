"""What a run measured, as one value that `evidence.json` holds whole and the report only draws."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen part of the evidence."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Estimate(Value):
    """A measured figure and how sure it is."""

    value: float
    """The figure."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Rows (or documents, or questions) behind it."""
    interval: str
    """How the interval was made: "wilson", "t", "bootstrap"."""


class Measure(Value):
    """One metric, before and after tuning, on the same rows."""

    name: str
    """Key of the metric, such as "exact_match"."""
    title: str
    """What a reader calls it, such as "Exact match"."""
    group: Literal["domain", "retention"]
    """Whether it says what was gained or what was kept."""
    unit: Literal["share", "nats", "ratio", "score"]
    """"share" is between 0 and 1 and is printed in percent."""
    higher_is_better: bool
    """Which way is good."""
    before: Estimate | None
    """The base model; None where it cannot do the task at all (an untrained head) or for a distance from the base."""
    after: Estimate
    """The tuned model."""
    change: Estimate | None
    """After minus before, paired by row."""
    verdict: Literal["better", "worse", "no clear change", "not compared"]
    """What the interval of the change says."""


class Figure(Value):
    """One figure of a baseline."""

    name: str
    """Key of the metric."""
    estimate: Estimate
    """Its value on the same test rows."""


class Baseline(Value):
    """A cheap alternative to tuning, on the same test rows."""

    name: str
    """Key, such as "linear_words"."""
    title: str
    """What a reader calls it."""
    how: str
    """One sentence: what was done."""
    seconds: float
    """Wall time to fit and predict."""
    figures: tuple[Figure, ...]
    """What it reached."""


class Strength(Value):
    """The tuned model with only a share of its update, measured on rows and texts that report nothing else."""

    share: float
    """Share of the update, 0 the base, 1 all of it."""
    gain: float
    """Validation loss of the base minus this one, in nats per scored token or row, for numbers in the task's own unit."""
    kept: float
    """Share of the general ability that is kept: exp of minus the mean rise of the loss on general text in nats per
    token for language models, the mean cosine to the base's embeddings for encoders, the base's root mean squared error
    over this one's on rows that the base was made for where answers are numbers; at most 1."""
    chosen: bool
    """Whether the floor chose this share."""


class Answer(Value):
    """One test row with both models' answers."""

    where: str
    """File and line of the row."""
    prompt: str
    """What was asked."""
    reference: str
    """The answer in the data."""
    before: str | None
    """The base model's answer."""
    after: str
    """The tuned model's answer."""
    before_right: bool | None
    """Whether the base model's answer counts as right; None where nothing says so."""
    after_right: bool | None
    """The same for the tuned model."""


class Breakdown(Value):
    """How well one target, or one group of rows, is predicted after tuning."""

    by: str
    """What the parts are: the noun of a target such as "protein", or a grouping such as "cell_type" or "donor"."""
    key: str
    """Which protein, cell type or donor."""
    n: int
    """Rows behind it; for a target, those where it was measured."""
    pearson: Estimate | None
    """Pearson correlation: of the target, or its mean over the targets within the group."""
    ccc: Estimate | None
    """Lin's concordance, likewise."""
    rmse: Estimate | None
    """Root mean squared error, likewise."""
    note: str = ""
    """Why a figure is missing."""


class Scatter(Value):
    """Points of one target for a figure, a fair draw where there are many."""

    key: str
    """Which target."""
    n: int
    """Measured values the points are drawn from."""
    measured: tuple[float, ...]
    """Measured values."""
    predicted: tuple[float, ...]
    """Predictions for the same rows."""


class Phase(Value):
    """One part of the run and what it cost."""

    name: str
    """Such as "load", "measure before", "train", "measure after"."""
    wall_seconds: float
    """Wall time."""
    cpu_seconds: float
    """CPU time of this process, all threads."""
    peak_memory_bytes: int
    """Highest resident memory (CPU) or allocated device memory (GPU) during the phase."""


class Cost(Value):
    """What the run cost."""

    phases: tuple[Phase, ...]
    """In order."""
    tokens_per_second: float
    """Training tokens without padding per second of training steps."""
    steps: int
    """Optimizer steps taken."""
    best_step: int
    """Step whose weights were kept."""
    parameters_moved: int
    """Numbers that training changed."""
    parameters_total: int
    """Numbers in the model, new ones included."""
    bytes_on_disk: int
    """Size of what must be stored to use the result, without the base for an adapter."""


class Setting(Value):
    """What was tuned on what."""

    model: str
    """The recipe's `model.base`."""
    model_fingerprint: str
    """Hex sha256 over the base weights."""
    task: str
    """Kind of the task."""
    method: str
    """One line, such as "LoRA, rank 16, alpha 32, every linear layer but the head"."""
    learning_rate: float
    """Peak rate."""
    learning_rate_reason: str
    """Why this rate."""
    data_format: str
    """Format of the rows."""
    rows_train: int
    """Training rows."""
    rows_validation: int
    """Validation rows."""
    rows_test: int
    """Test rows in the files."""
    rows_measured: int
    """Test rows that were measured."""
    data_fingerprint: str
    """Hex sha256 over the rows."""
    seed: int
    """Seed of the run."""
    confidence: float
    """Coverage of every interval."""


class Evidence(Value):
    """Everything a run measured."""

    version: Literal[1] = 1
    """Version of this form."""
    metier: str
    """Version of metier."""
    finished: str
    """UTC time, ISO 8601."""
    command: str
    """What to type to get the same."""
    setting: Setting
    """What was tuned on what."""
    verdict: tuple[str, ...]
    """Two or three sentences a busy person reads: gain, retention, cost. First the answer."""
    primary: str
    """Name of the measure that decides."""
    measures: tuple[Measure, ...]
    """Domain first, then retention."""
    baselines: tuple[Baseline, ...]
    """Cheap alternatives."""
    cost: Cost
    """What it cost."""
    floor: float | None = None
    """Share of the general ability that had to be kept (`train.retain`); None where none was set."""
    strengths: tuple[Strength, ...] = ()
    """Shares of the update that were tried, where a floor was set."""
    masked: float | None = None
    """Share of the learnt tokens that were not learnt (`guards.mask_improbable`); None where none was to be left out."""
    answers: tuple[Answer, ...]
    """Side-by-side answers; wins, losses and others."""
    breakdowns: tuple[Breakdown, ...] = ()
    """Where answers are numbers: the tuned model by target and by group of rows."""
    scatters: tuple[Scatter, ...] = ()
    """Where answers are numbers: measured and predicted values of a sample of rows."""
    notes: tuple[str, ...]
    """What the user was told on the way: warnings, rows dropped, what could not be measured and why."""
