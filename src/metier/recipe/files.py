"""Recipe files: YAML in, a checked `Recipe` out, every fault at once with its line."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from metier.core.errors import Fault, RecipeError
from metier.recipe.recipe import Recipe

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class _Source:
    """What was typed, and where each key of it stands."""

    tree: dict[str, Any]
    places: dict[Place, str]

    def where(self, place: Place) -> str:
        """The nearest known place, walking up from `place`."""
        while place and place not in self.places:
            place = place[:-1]
        return self.places.get(place, "recipe")


class _Dumper(yaml.SafeDumper):
    """PyYAML's own writer loses rare line breaks unless the text that holds them stands in double quotes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as `train.learning_rate=2e-4`.

    Raises:
        RecipeError: With every fault of the file and the overrides, each with its line and a suggestion.
    """
    source = _apply(_read(Path(path)), overrides)
    return _validate(source)


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The same for a recipe that is already a mapping, such as one built in Python."""
    return _validate(_apply(_Source(dict(tree), {}), overrides))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load` gives the same recipe back."""
    tree = recipe.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def _read(path: Path) -> _Source:
    text = text_of(path)
    try:
        _check_shape(text, path)
        node = yaml.compose(text, yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise RecipeError(f"not YAML: {what}", where=where, hint="check indentation, colons and quotes") from None
    except ValueError as error:  # PyYAML's own for 2020-99-99 or a number of thousands of digits
        raise RecipeError(f"not YAML: {error}", where=str(path), hint="put words in quotes") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            "a recipe is a mapping of sections", where=str(path), hint="`metier init` writes one to start from"
        )
    places: dict[Place, str] = {}
    faults = list(_walk(node, (), path, places))
    if faults:
        raise RecipeError.of(faults)
    return _Source(tree, places)


def _check_shape(text: str, path: Path) -> None:
    """Refuse what could unfold to more than is written, before anything is built."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError("aliases (*name) are not read", where=str(path), hint="write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(
                f"nested deeper than {MAX_DEPTH} levels",
                where=f"{path}:{event.start_mark.line + 1}",  # type: ignore[union-attr]
                hint="a recipe is flat; is a bracket left open?",
            )


def text_of(path: str | Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: If there is none, or it is too large or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "`metier init` writes a recipe to start from"
        raise RecipeError(f"the recipe {kind}", where=str(path), hint=hint)
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError("larger than 1 MiB", where=str(path), hint="a recipe is a short YAML file; is this the data?")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", where=str(path), hint="save it as UTF-8") from None


def _walk(node: yaml.Node, place: Place, path: Path, places: dict[Place, str]) -> Iterator[Fault]:
    """Note the line of every key; yield one fault for each key that stands twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*place, str(key.value))
            where = f"{path}:{key.start_mark.line + 1}"
            if below in places:
                yield Fault(where, f"{_dotted(below)} stands twice, first at {places[below]}", "keep one of them")
            if key.tag != "tag:yaml.org,2002:str":
                yield Fault(where, f"YAML does not take the key {_dotted(below)} for text", "put it in quotes")
            places[below] = where
            yield from _walk(value, below, path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[*place, index] = f"{path}:{value.start_mark.line + 1}"
            yield from _walk(value, (*place, index), path, places)


def _apply(source: _Source, overrides: Sequence[str]) -> _Source:
    tree = _copy(source.tree)
    places = dict(source.places)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                "an override is section.key=value",
                where=f"override {override!r}",
                hint="for example train.learning_rate=2e-4",
            )
        place = tuple(key.strip().split("."))
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        _set(tree, place, value)
        for below in [p for p in places if p[: len(place)] == place]:
            del places[below]
        for depth in range(1, len(place) + 1):
            places.setdefault(place[:depth], f"override {override!r}")
        places[place] = f"override {override!r}"
    return _Source(tree, places)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _set(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        below = tree.get(key)
        if isinstance(below, str):  # `method: lora` and then method.rank=8
            below = {"kind": below}
        if not isinstance(below, dict):
            below = {}
        tree[key] = below
        tree = below
    tree[place[-1]] = value


def _validate(source: _Source) -> Recipe:
    try:
        return Recipe.model_validate(source.tree)
    except ValidationError as error:
        raise RecipeError.of(_joined(_fault(dict(item), source) for item in error.errors(include_url=False))) from None


def _joined(faults: Iterator[Fault]) -> list[Fault]:
    """One fault where a value missed several choices: its hints are alternatives."""
    hints: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        hints.setdefault((fault.where, fault.what), []).append(fault.hint)
    return [Fault(where, what, ", or ".join(dict.fromkeys(several))) for (where, what), several in hints.items()]


def _fault(item: dict[str, Any], source: _Source) -> Fault:
    """One of pydantic's findings in our words."""
    loc = item["loc"]
    place = _plain(loc, source.tree)
    known = _fields_at(loc[:-1])
    kind, context = item["type"], item.get("ctx", {})
    where = source.where(place)
    if kind == "extra_forbidden":
        return Fault(where, f"unknown key {_dotted(place)}", _did_you_mean(str(loc[-1]), known))
    if kind == "missing" and isinstance(loc[-1], int):
        return Fault(where, f"{_dotted(place)} has too few values", f"it needs one more than {loc[-1]}")
    if kind == "missing":
        doc = known.get(str(loc[-1]), "")
        return Fault(where, f"{_dotted(place)} is missing", f"add it: {doc}" if doc else "add it")
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return Fault(where, f"{_dotted(place)} has no known kind", _one_of(str(context.get("tag", "")), _kinds_at(loc)))
    said = f"{_dotted(place)} is {item['input']!r}"
    if kind == "literal_error":
        options = [word.strip().strip("'") for word in context["expected"].replace(" or ", ", ").split(",")]
        return Fault(where, said, _one_of(str(item["input"]), options))
    if kind == "string_pattern_mismatch":
        return Fault(where, said, f"it should be of the form {_in_words(context['pattern'])}")
    if kind == "string_type" and isinstance(item["input"], int | float):
        return Fault(
            where, said, "it should be a text, such as the name of a file; put a number that is meant as one in quotes"
        )
    message = item["msg"].removeprefix("Input ").removeprefix("Value error, ").replace("tuple", "list")
    message = re.sub(r"dictionary( or (instance|object).*)?", "mapping", message)
    return Fault(where, said, f"it {message}" if message.startswith("should") else message)


def _in_words(pattern: str) -> str:
    """A pattern of ours as somebody would say it: words to choose from, else as it is."""
    options = re.fullmatch(r"\^\(([\w|]+)\|cuda\(:\\d\+\)\?\)\$", pattern)
    return ", ".join([*options[1].split("|"), "cuda or cuda:0"]) if options else pattern


def _plain(loc: Sequence[str | int], tree: Any) -> Place:
    """Pydantic's place without the names of union members, which the user never wrote."""
    place: list[str | int] = []
    for depth, word in enumerate(loc):
        last = depth == len(loc) - 1
        inside = (isinstance(tree, Mapping) and word in tree) or (
            isinstance(tree, list) and isinstance(word, int) and word < len(tree)
        )
        if inside:
            place.append(word)
            tree = tree[word]
        elif last and isinstance(tree, Mapping):
            place.append(word)
    return tuple(place)


def _fields_at(loc: Sequence[str | int]) -> dict[str, str]:
    """Key -> documentation of the section that pydantic's place names."""
    section, _ = _section_at(loc)
    return {key: field.description or "" for key, field in section.model_fields.items()} if section else {}


def _kinds_at(loc: Sequence[str | int]) -> list[str]:
    """The kinds among which the section at pydantic's place is chosen."""
    return list(_section_at(loc)[1])


def _section_at(loc: Sequence[str | int]) -> tuple[type[BaseModel] | None, dict[str, type[BaseModel]]]:
    """The section at pydantic's place, or the sections by kind where it is still to be chosen."""
    section: type[BaseModel] | None = Recipe
    choices: dict[str, type[BaseModel]] = {}
    for word in loc:
        if choices and word in choices:
            section, choices = choices[str(word)], {}
            continue
        field = section.model_fields.get(str(word)) if section else None
        if field is None:
            return None, {}
        models = list(_models(field.annotation))
        section = models[0] if len(models) == 1 else None
        choices = {str(model.model_fields["kind"].default): model for model in models if "kind" in model.model_fields}
    return section, choices


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _models(typing.get_args(annotation)[0])
    elif origin in {typing.Union, types.UnionType}:
        for part in typing.get_args(annotation):
            yield from _models(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _did_you_mean(word: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"keys here: {', '.join(known)}" if known else "remove it"


def _one_of(word: str, options: Sequence[str]) -> str:
    if len(options) == 1:
        return options[0]
    near = difflib.get_close_matches(word, options, 1, 0.5)
    listed = f"one of {', '.join(options)}"
    return f"did you mean {near[0]}? ({listed})" if near else listed


def _dotted(place: Place) -> str:
    return ".".join(map(str, place)) or "the recipe"
