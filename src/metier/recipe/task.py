"""`task:` -- what is learnt from a row."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from metier.recipe.section import KindOrWord, Section


class ChatTask(Section):
    """Answer like the replies in the data. Only replies are learnt, in the model's own chat template."""

    kind: Literal["chat"] = "chat"
    system: str | None = None
    """System prompt put before every conversation that has none."""
    supervise: Literal["replies", "last"] = "replies"
    """Learn from every assistant turn, or only from the last one."""
    template: str | None = None
    """Jinja file with a chat template, for models that bring none."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest row in tokens; null takes the model's context, at most 4096. No answer is ever cut."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with rows longer than `max_tokens`."""


class CompleteTask(Section):
    """Continue text: pretraining on plain text, prefix to rest, or fill in the middle."""

    kind: Literal["complete"] = "complete"
    middle_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the training rows turned into fill-in-the-middle. Source: Bavarian et al. 2022, arXiv:2207.14255."""
    middle_tokens: tuple[str, str, str] | None = None
    """The prefix, suffix and middle markers; null takes the tokenizer's own."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest window in tokens; null takes the model's context, at most 1024. Longer plain text is cut into windows."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with prompt/completion rows longer than `max_tokens`."""


class ClassifyTask(Section):
    """Sort text into classes, with a classification head or with label words of a causal language model."""

    kind: Literal["classify"] = "classify"
    labels: tuple[str, ...] | None = None
    """The classes in order; null takes the sorted labels of the training rows."""
    way: Literal["auto", "head", "words"] = "auto"
    """"head" trains a new output layer, "words" ranks the label names by likelihood; "auto": words for a causal model, else head."""
    template: str = "{text}\nLabel:"
    """How a text is put to a causal model; the label follows after a space."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest row in tokens; null takes the model's context, at most 512. Longer texts are cut at the end."""


class CellsTask(Section):
    """Predict the proteins of single cells from their RNA."""

    kind: Literal["cells"] = "cells"
    transform: Literal["auto", "clr", "log1p", "minmax", "none"] = "auto"
    """How protein counts become targets; "auto": as the model was pretrained, else "clr". Predictions are on this scale."""
    loss: Literal["mse", "huber"] = "mse"
    """Squared error over measured values, as published, or Huber's, which outliers pull less."""
    huber_delta: float = Field(default=1.0, gt=0)
    """Error from which Huber's loss grows in a line."""
    correlation: float = Field(default=0.0, ge=0, le=10)
    """Weight of a further term: one minus the correlation over the proteins of each cell."""
    cosine: float = Field(default=0.0, ge=0, le=10)
    """The same for the cosine similarity."""
    calibrate: bool = True
    """Fit the output layer in closed form before tuning, where the network offers it: naive tuning rarely beats that alone."""
    longer: Literal["refuse", "sample"] = "refuse"
    """For scTranslator, a panel of more genes or proteins than it holds: refuse, or draw as many at random, as published."""
    redraw: bool = True
    """For scTranslator, draw the random features of its attention anew every 1000 steps, as published; false keeps them."""
    overlap: float = Field(default=0.6, ge=0, le=1)
    """Share of the genes that the model must know."""
    organism: Literal["human", "mouse"] = "human"
    """Whose genes the model knows."""


class OwnTask(Section):
    """A task of your own: numbers to predict from rows, for any network."""

    kind: Literal["own"] = "own"
    use: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """The class, "package.module:Class", a metier.ValueTask; it is imported and called with `arguments`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What the class is called with."""


TextTaskSection = ChatTask | CompleteTask | ClassifyTask
"""The tasks whose answers are text."""
TaskSection = Annotated[
    Annotated[TextTaskSection | CellsTask | OwnTask, Field(discriminator="kind")],
    KindOrWord(),
]
