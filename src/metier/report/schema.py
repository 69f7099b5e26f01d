"""What evidence.json and comparison.json look like, as JSON Schema for programs that read them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import FloatSchema

from metier.core.comparison import Comparison
from metier.core.evidence import Evidence

Kind = Literal["evidence", "comparison"]
MODELS: dict[Kind, type[BaseModel]] = {"evidence": Evidence, "comparison": Comparison}


class _Written(GenerateJsonSchema):
    """Numbers as the files have them: JSON has no infinity, so it is written as text."""

    def float_schema(self, schema: FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["Infinity", "-Infinity", "NaN"]}]}


def json_schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema of `evidence.json` of a run or of `comparison.json` of an experiment."""
    return MODELS[kind].model_json_schema(schema_generator=_Written)
