"""Promises of the source itself, checked on its syntax tree."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

import metier

ROOT = Path(metier.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "scipy",
    "sklearn",
    "matplotlib",
    "numpy",
    "datasets",
    "tokenizers",
    "safetensors",
}
SAFE_YAML = {
    "safe_load",
    "safe_dump",
    "dump",
    "safe_load_all",
    "safe_dump_all",
    "SafeLoader",
    "SafeDumper",
    "compose",
    "parse",
}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with its dotted name; names that an import gave are written out."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                (a.asname or a.name).split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return [(dotted(node.func, aliases), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def constant(call: ast.Call, word: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == word and isinstance(k.value, ast.Constant)), None)


def dangers(source: str) -> list[str]:
    """What must not stand in the source, as line: what."""
    found = []
    for name, call in calls(ast.parse(source)):
        last = name.rsplit(".", 1)[-1]
        unpickles = re.match(r"(_?pickle|cloudpickle|dill|joblib|shelve|marshal)\.(load|loads|open|Unpickler)$", name)
        if unpickles or last == "Unpickler":
            found.append(f"{call.lineno}: {name}")
        if name == "torch.load" and constant(call, "weights_only") is not True:
            found.append(f"{call.lineno}: torch.load without weights_only=True")
        if name.startswith("yaml.") and last not in SAFE_YAML:
            found.append(f"{call.lineno}: {name}")
        if name in {"yaml.compose", "yaml.parse"} and "SafeLoader" not in ast.unparse(call):
            found.append(f"{call.lineno}: {name} without SafeLoader")
        if name in {"eval", "exec", "os.system", "os.popen", "builtins.eval", "builtins.exec", "subprocess.getoutput"}:
            found.append(f"{call.lineno}: {name}")
        if constant(call, "shell") is True or constant(call, "trust_remote_code") is True:
            found.append(f"{call.lineno}: {name} with shell=True or trust_remote_code=True")
        if name.endswith(("numpy.load", "np.load")) and constant(call, "allow_pickle") is True:
            found.append(f"{call.lineno}: {name} with allow_pickle=True")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as l\nl(b)",
        "import pickle as p\nclass A(p.Unpickler): pass\np.Unpickler(f)",
        "import torch\ntorch.load(p)",
        "import torch as t\nt.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(t)",
        "import yaml\nyaml.compose(t)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('x')",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p, trust_remote_code=True)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
    ],
)
def test_the_test_sees_a_danger(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import yaml\nyaml.safe_load(t)",
        "model.eval()",
        "import json\njson.loads(t)",
    ],
)
def test_the_test_sees_none_where_none_is(source):
    assert not dangers(source)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
class TestFile:
    def test_runs_nothing_that_a_file_could_bring(self, path):
        assert not dangers(path.read_text("utf-8"))

    def test_has_a_docstring_and_at_most_500_lines(self, path):
        text = path.read_text("utf-8")
        said = ast.get_docstring(ast.parse(text))
        assert said
        assert len(said.split()) >= 3
        assert len(text.splitlines()) <= 500

    def test_nothing_is_left_to_do(self, path):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text("utf-8"))

    def test_swallows_no_error(self, path):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path.name}:{node.lineno} catches everything"
                assert not all(isinstance(line, ast.Pass) for line in node.body), f"{path.name}:{node.lineno} swallows"

    def test_prints_only_through_the_log_or_the_console(self, path):
        assert not [call.lineno for name, call in calls(ast.parse(path.read_text("utf-8"))) if name == "print"]

    def test_every_silenced_finding_names_its_rule(self, path):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
            if token.type == tokenize.COMMENT and re.search(r"noqa|type: *ignore", token.string):
                assert re.search(r"noqa: ?[A-Z]+\d+|type: ignore\[", token.string), f"{path.name}:{token.start[0]}"


def imported_at_top(path: Path) -> set[str]:
    """First words of what a file imports when it is imported; what only the type checker sees is left out."""
    found: set[str] = set()
    nodes: list[ast.AST] = [*ast.parse(path.read_text("utf-8")).body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


LIGHT = [
    path
    for path in FILES
    if path.relative_to(ROOT).parts[0] in {"cli.py", "recipe", "core", "__init__.py", "__main__.py", "api.py"}
]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_lowest_rooms_and_the_command_line_import_nothing_heavy(path):
    assert not imported_at_top(path) & HEAVY


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_slow_packages_are_imported_inside_functions(path):
    assert not imported_at_top(path) & {"transformers", "peft", "scipy", "sklearn", "matplotlib", "datasets"}


class TestPublicNames:
    def test_are_what_they_are(self):
        assert sorted(metier.__all__) == [
            "BusyError", "DataError", "DivergedError", "Evidence", "InterruptedRunError", "MetierError", "ModelError", "Recipe",
            "RecipeError", "Run", "StorageError", "UnsafeError", "ValueTask", "__version__", "check", "init", "load", "plan", "resolve", "train",
        ]  # fmt: skip

    @pytest.mark.parametrize("name", metier.__all__)
    def test_each_is_there_and_documented(self, name):
        value = getattr(metier, name)
        if name != "__version__":
            assert value.__doc__
            assert value.__module__.startswith("metier.")

    def test_dir_and_unknown_names(self):
        assert dir(metier) == sorted(metier.__all__)
        with pytest.raises(AttributeError, match="trian"):
            _ = metier.trian

    @pytest.mark.parametrize(
        "room", sorted({p.parent.relative_to(ROOT).as_posix() for p in FILES if p.name == "__init__.py"} - {"."})
    )
    def test_every_door_keeps_its_word(self, room):
        door = importlib.import_module(f"metier.{room.replace('/', '.')}")
        for name in getattr(door, "__all__", ()):
            assert getattr(door, name) is not None, name
