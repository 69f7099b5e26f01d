"""What evidence.json, comparison.json and interference.json look like, as JSON Schema for programs that read them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import FloatSchema

from metier.core.comparison import Comparison, Interference
from metier.core.evidence import Evidence

Kind = Literal["evidence", "comparison", "interference"]
MODELS: dict[Kind, type[BaseModel]] = {
    "evidence": Evidence,
    "comparison": Comparison,
    "interference": Interference,
}


class _Written(GenerateJsonSchema):
    """Numbers as the files have them: JSON has no infinity, so it is written as text."""

    def float_schema(self, schema: FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["Infinity", "-Infinity", "NaN"]}]}


def json_schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema of a run's `evidence.json`, or of an experiment's `comparison.json` or `interference.json`."""
    return MODELS[kind].model_json_schema(schema_generator=_Written)
