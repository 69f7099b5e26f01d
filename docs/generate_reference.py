"""Writes docs/reference from the source: recipe.md from the sections' docstrings, cli.md from the commands' help.

python docs/generate_reference.py
"""  # noqa: INP001

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

from metier.cli import app
from metier.core import errors
from metier.recipe import json_schema

REFERENCE = Path(__file__).parent / "reference"
MADE = "<!-- Made by docs/generate_reference.py from the source; edit the docstrings there. -->\n"


def recipe_page() -> str:
    """Every section of a recipe with its keys."""
    schema = json_schema()
    parts = [
        MADE,
        "# The recipe, key by key\n",
        "A recipe is one YAML file with the sections below; `model`, `data` and `task` are needed. Any key can be set "
        "on the command line: `metier train job.yaml train.learning_rate=2e-4`. `metier schema` prints the same as "
        "JSON Schema for editors.\n",
    ]
    for name in schema["properties"]:
        parts += list(_section(name, schema["properties"][name], schema["$defs"]))
    return "\n".join(parts)


def _section(name: str, field: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    models = [known[reference] for reference in _references(field)]
    if len(models) == 1:
        yield f"## {name}\n\n{models[0]['description']}\n"
        yield _table(models[0], known)
        for key, inner in models[0]["properties"].items():
            for reference in _references(inner):
                yield from _kind(f"{name}.{key}", known[reference], known)
        return
    yield f"## {name}\n\n{field['description']} The word alone stands for the kind with its defaults: `{name}: KIND`.\n"
    for model in models:
        yield from _kind(name, model, known)


def _kind(where: str, model: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    kind = model["properties"].get("kind")
    yield f"### {where}{': ' + kind['const'] if kind else ''}\n\n{model['description']}\n"
    if len(model["properties"]) > 1:
        yield _table(model, known)


def _table(model: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    needed = model.get("required", [])
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in model["properties"].items():
        if key != "kind":
            default = "needed" if key in needed else f"`{_default(field.get('default', {}))}`"
            meaning = _cell(field.get("description", ""))
            lines.append(f"| `{key}` | {_cell(_value(field, known))} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if isinstance(value, Mapping) and "kind" in value:
        return str(value["kind"])
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _references(field: Mapping[str, Any]) -> list[str]:
    """Names of the sections among which a key's value is chosen."""
    if "$ref" in field:
        return [field["$ref"].rpartition("/")[2]]
    return list(
        dict.fromkeys(name for way in ("anyOf", "oneOf") for part in field.get(way, ()) for name in _references(part))
    )


def _value(field: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What may stand there, in words."""
    if references := _references(field):
        kinds = [known[name]["properties"].get("kind") for name in references]
        if None in kinds:
            return "the keys below, or `null`"
        return "one of " + ", ".join(f"`{kind['const']}`" for kind in kinds)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_value(part, known) for part in field["anyOf"]))
    if "enum" in field:
        return " or ".join(f"`{word}`" for word in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    return _plain(field, known)


def _plain(field: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    kind = field["type"]
    if kind == "array":
        items = field.get("prefixItems")
        return f"{len(items)} × {_value(items[0], known)}" if items else f"list of {_value(field['items'], known)}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {field[word]:g}" for word, sign in signs.items() if word in field)
    names = {"object": "mapping", "boolean": "true or false", "string": "text", "null": "null"}
    return f"{names.get(kind, kind)} {limits}".strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def cli_page() -> str:
    """Every command with its words."""
    root: Any = typer.main.get_command(app)
    parts = [
        MADE,
        "# The commands\n",
        "What a command answers goes to stdout, what it tells on the way to stderr. `--json` prints one JSON object, "
        "faults included. `NO_COLOR` switches colour off.\n",
    ]
    parts += [_command(name, command) for name, command in root.commands.items()]
    parts += ["## Exit codes\n", _exit_codes()]
    return "\n".join(parts)


def _command(name: str, command: Any) -> str:
    words = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([f"metier {name}", *map(_name, words), "[OPTIONS]"])
    lines = [f"## metier {name}\n", f"{command.help}\n", f"```text\n{usage}\n```\n", "| word | meaning |", "|---|---|"]
    lines += [f"| {_name(word)} | {_cell(word.help or '')} |" for word in words]
    for option in options:
        needed = " Needed." if option.required else ""
        lines.append(f"| `{'`, `'.join(option.opts)}` | {_cell(option.help or '')}{needed} |")
    return "\n".join(lines) + "\n"


def _name(word: Any) -> str:
    """A positional word, in brackets where it may be left out."""
    return str(word.metavar or (word.name.upper() if word.required else f"[{word.name.upper()}]"))


def _exit_codes() -> str:
    lines = ["| code | meaning |", "|---|---|", "| 0 | done |", "| 1 | a bug in metier |"]
    leaves: dict[int, list[str]] = {}
    for error in (errors.RecipeError, errors.GateError, errors.DataError, errors.ModelError, errors.DivergedError,
                  errors.BusyError, errors.StorageError, errors.InterruptedRunError, errors.UnsafeError):  # fmt: skip
        leaves.setdefault(error.exit_code, []).append(f"{error.__name__}: {str(error.__doc__).strip()}")
    lines += [f"| {code} | {_cell(' '.join(told))} |" for code, told in leaves.items()]
    return "\n".join(lines) + "\n"


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page}


def main() -> None:
    """Write every page."""
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
