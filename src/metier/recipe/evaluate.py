"""`evaluate:` -- what is measured, before and after."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from metier.recipe.section import Section


def _no_is_off(value: Any) -> Any:
    # YAML reads a bare `off` as false.
    return "off" if value is False else value


class EvaluateSection(Section):
    """The measurement; the same before and after tuning, on the same rows."""

    rows: int | None = Field(default=200, ge=1)
    """Most test rows that are measured, drawn with the data seed; null takes all."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer."""
    generate: bool = True
    """Also let the model answer the test prompts, and compare with the references; false takes the loss only."""
    answer_after: str | None = None
    """Text after which the final answer stands, such as "####"; exact match then compares what follows it."""
    json_schema: str | None = None
    """File with a JSON Schema that answers must satisfy."""
    run_tests: bool = False
    """Run the unit tests that rows carry against the generated code, in a limited subprocess. This executes what the model writes."""
    test_seconds: float = Field(default=5.0, gt=0)
    """Time limit of one row's unit tests."""
    test_megabytes: int = Field(default=512, ge=64)
    """Memory limit of one row's unit tests."""
    retention: Annotated[str, BeforeValidator(_no_is_off)] = "neutral"
    """What must not be lost: "neutral" (the shipped pack; "neutral-en" and "neutral-zh" for one language), a JSONL file of your own in its form, or "off"."""
    baselines: bool = True
    """Also measure cheap alternatives to tuning, such as a linear model on word counts."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Coverage of the intervals."""
