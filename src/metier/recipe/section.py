"""What every part of a recipe has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class Section(BaseModel):
    """A part of the recipe: frozen, and an unknown key is an error. A field's docstring is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


@dataclass(frozen=True, slots=True)
class KindOrWord:
    """Lets `method: lora` stand for `method: {kind: lora}`, and `method: {rank: 8}` for the usual kind with rank 8.

    Attributes:
        usual: The kind that a mapping without one means; None where there is no usual one.
    """

    usual: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Put the kind in before pydantic chooses by it."""
        return core_schema.no_info_before_validator_function(self._with_kind, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A mapping, or the word alone."""
        choice = handler(schema)
        return {"anyOf": [choice, {"enum": list(choice["discriminator"]["mapping"])}]}

    def _with_kind(self, value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and self.usual is not None:
            return {"kind": self.usual, **value}
        return value
