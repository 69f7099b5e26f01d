"""`data:` -- the rows or cells to learn from, and those to be judged on."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from metier.recipe.section import Section


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-1 for a word; nobody names a file so."""
    is_number = isinstance(value, str) and re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", value, re.IGNORECASE)
    return float(value) if is_number else value


Share = Annotated[float, Field(gt=0, lt=1)]
ShareOrFile = Annotated[Share | str, BeforeValidator(_number)]
FormatName = Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text", "label", "row"]


class ReplaySection(Section):
    """General rows mixed among the training rows, against forgetting."""

    rows: str = Field(default="neutral", min_length=1)
    """"neutral" (texts and replies that come with metier, in the languages of `evaluate.retention`; none of them is measured), "base" (requests that come with metier, with the answers that the base itself gives; for chat models), or a file of rows in the form of your own. Source for "base": arXiv:2510.18874 (what is learnt from a model's own answers makes it forget less)."""
    share: Share = 0.05
    """Of the rows of a pass; the training rows all stay, so that a pass has more steps."""


class DataSection(Section):
    """Files of rows: JSONL, JSON or CSV, plain or gzipped; for cells h5mu, or two h5ad."""

    train: str = Field(min_length=1)
    """File of training rows, or of cells."""
    proteins: str | None = None
    """For cells: the h5ad file of proteins, joined by the names of the cells; null where `train` holds both (h5mu)."""
    validation: ShareOrFile = 0.1
    """File of validation rows, or the share of the training rows to set aside. Chooses the best step; never reported as the result."""
    test: ShareOrFile = 0.1
    """File of test rows, or the share of the training rows to set aside. Read once before and once after tuning."""
    format: FormatName = "auto"
    """How a row is written; "auto" looks: OpenAI messages, ShareGPT conversations, Alpaca, prompt/completion, text, text/label."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Your column for each word of the format, such as {prompt: question, completion: answer}; for cells such as {donor: patient, cell_type: annotation, layer: counts, gene_ids: my_Id}."""
    group: str | None = None
    """Column whose equal values must not be split over train and test (source document, patient); for cells null takes the donor's where there are several, and "none" splits at random."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows kept from each file, drawn with the seed; null keeps all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split and of `max_rows`."""
    replay: ReplaySection | None = None
    """General rows that are practised beside the training rows, so that less is forgotten; null takes none."""
    overlap: Literal["refuse", "drop", "allow"] = "refuse"
    """Training rows that also stand in validation or test, word for word or nearly: refuse to run, drop them from training, or allow."""
    personal_data: Literal["warn", "refuse", "drop", "ignore"] = "warn"
    """What to do about e-mail addresses, phone and card numbers, and keys found in the rows: tell, refuse to run, leave those rows out, or not look."""
    strict: bool = False
    """Refuse conversations that can be learnt but are unusual (one speaker twice in a row, the assistant first, no reply at the end) instead of telling of them."""
