"""`export:` -- where the result goes, and in which form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Section


class ExportSection(Section):
    """The run folder."""

    folder: str = Field(default="runs/job", min_length=1)
    """The run folder: everything about the run stands in it."""
    merge: bool = False
    """For LoRA: also write the merged model, in `merged/`, for programs that cannot load adapters."""
    original: bool = False
    """For scTranslator: also write the whole network as `original.pt`, in the layout of the published scripts; with LoRA set `merge` as well."""
    checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept for resuming, beside the best weights; where the newest is damaged, the one before it is taken."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """Minutes of training between two checkpoints; one more is written when the run is interrupted. The training goes on while one is written."""
    language: Literal["en", "zh"] = "en"
    """Language of the report."""
    license: str | None = None
    """Licence named in the model card; null names none."""
