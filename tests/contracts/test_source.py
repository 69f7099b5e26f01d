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


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each name that an import or a plain assignment gave stands for, dotted."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (a.asname or a.name).split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            said = dotted(node.value, found)
            found |= {t.id: said for t in node.targets if isinstance(t, ast.Name) and said.split(".")[0] in MODULES}
    return found


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with its dotted name; names that an import gave are written out."""
    names = names_of(tree)
    return [
        (dotted(node.func, names).removeprefix("builtins."), node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    if (
        isinstance(node, ast.Call)
        and dotted(node.func, names) in {"__import__", "importlib.import_module"}
        and node.args
    ):
        return str(getattr(node.args[0], "value", "?"))
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def word(call: ast.Call, name: str) -> ast.expr | None:
    """The value of a keyword; what `**{...}` hands over counts as well."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
        if keyword.arg is None and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    return value
    return None


def is_true(call: ast.Call, name: str) -> bool:
    """Whether a keyword is True, 1 or any other constant that counts as true."""
    value = word(call, name)
    return isinstance(value, ast.Constant) and bool(value.value)


MODULES = {
    "pickle",
    "marshal",
    "os",
    "subprocess",
    "torch",
    "yaml",
    "numpy",
    "jinja2",
    "tempfile",
    "builtins",
    "shelve",
}
NEVER = re.compile(
    r"(_?pickle|cloudpickle|dill|joblib|shelve|marshal|pandas)\.(load|loads|open|Unpickler|read_pickle)"
    r"|eval|exec|compile|__import__|(os|posix)\.(system|popen|spawn\w+|exec\w+)|subprocess\.(getoutput|getstatusoutput)"
    r"|asyncio\.create_subprocess_shell|pty\.spawn|code\.interact|tempfile\.mktemp|torch\.(hub|jit)\.load"
    r"|torch\.package\.PackageImporter|runpy\.\w+|pydoc\.locate"
)
"""Calls that run what they are given, or can be made to."""
STARTS = re.compile(r"subprocess\.(run|call|Popen|check_call|check_output)|asyncio\.create_subprocess_exec")
UNSANDBOXED = re.compile(r"jinja2(\.\w+)*\.(Environment|NativeEnvironment|Template)")


def is_text(node: ast.expr | None) -> bool:
    """Whether a command is one text, which a shell or a search of PATH would take apart."""
    return isinstance(node, ast.JoinedStr | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def dangers(source: str) -> list[str]:
    """What must not stand in the source, as line: what."""
    found = []
    tree = ast.parse(source)
    for name, call in calls(tree):
        last = name.rsplit(".", 1)[-1]
        first = call.args[0] if call.args else word(call, "args")
        checks = {
            name: NEVER.fullmatch(name) or last == "Unpickler",
            "torch.load without weights_only=True": name in {"torch.load", "torch.serialization.load"}
            and not (isinstance(word(call, "weights_only"), ast.Constant) and word(call, "weights_only").value is True),
            "a loader of yaml that is not safe": name.startswith("yaml.") and last not in SAFE_YAML,
            "yaml without SafeLoader": name in {"yaml.compose", "yaml.parse"} and "SafeLoader" not in ast.unparse(call),
            "shell=True": is_true(call, "shell"),
            "trust_remote_code=True": is_true(call, "trust_remote_code"),
            "numpy.load with allow_pickle=True": name in {"numpy.load", "numpy.lib.npyio.NpzFile"}
            and (is_true(call, "allow_pickle") or len(call.args) > 2),
            "a command that is one text": STARTS.fullmatch(name) and is_text(first),
            "templates outside the sandbox": UNSANDBOXED.fullmatch(name),
        }
        found += [f"{call.lineno}: {what}" for what, is_there in checks.items() if is_there]
    for node in ast.walk(tree):
        # "trust_remote_code": True in a dict that is handed over later.
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in {"trust_remote_code", "allow_pickle", "shell"}:
                    found += [f"{node.lineno}: {key.value}=True"] * (
                        isinstance(value, ast.Constant) and bool(value.value)
                    )
    return found


ALLOWED = {
    "core/heap.py": "os.execv",  # it starts the same program again, with the words that it was started with
    "report/page.py": "templates outside the sandbox",  # it renders templates of this package alone
    "evaluation/launcher.py": "runpy.run_path",  # it is what runs the tests of generated code, with its hands tied
}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as l\nl(b)",
        "import pickle as p\nclass A(p.Unpickler): pass\np.Unpickler(f)",
        "import pickle\nread = pickle.loads\nread(b)",
        "import _pickle\n_pickle.loads(b)",
        "from joblib import load\nload(p)",
        "import shelve\nshelve.open(p)",
        "import marshal\nmarshal.loads(b)",
        "from marshal import load as read\nread(f)",
        "import pandas as pd\npd.read_pickle(p)",
        "import torch\ntorch.load(p)",
        "import torch as t\nt.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "import torch\ntorch.load(p, weights_only=1)",
        "from torch import load\nload(p)",
        "from torch.serialization import load as read\nread(p)",
        "import torch\ntorch.load(p, **{'weights_only': False})",
        "import torch\ntorch.hub.load(a, b)",
        "import torch\ntorch.jit.load(p)",
        "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)",
        "import yaml as y\ny.full_load(t)",
        "from yaml import unsafe_load\nunsafe_load(t)",
        "import yaml\nyaml.compose(t)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nsubprocess.run(['x'], shell=1)",
        "import subprocess\nsubprocess.run(['x'], **{'shell': True})",
        "import subprocess as s\ns.Popen('ls ' + name)",
        "from subprocess import check_output\ncheck_output(f'ls {name}')",
        "import subprocess\nsubprocess.run(args='ls')",
        "import subprocess\nsubprocess.getoutput(command)",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as run\nrun('1')",
        "compile('1', 'x', 'eval')",
        "__import__('os').system('x')",
        "import importlib\nimportlib.import_module('os').system('x')",
        "import os\nos.system('x')",
        "from os import system as s\ns('x')",
        "import os\nos.popen('x')",
        "import os as o\no.execv('x', [])",
        "import runpy\nrunpy.run_path(p)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p, trust_remote_code=True)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p, **{'trust_remote_code': True})",
        "options = {'trust_remote_code': True}",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "from numpy import load\nload(p, None, True)",
        "from jinja2 import Environment as E\nE()",
        "import jinja2\njinja2.Template(t).render()",
        "import jinja2\njinja2.nativetypes.NativeEnvironment()",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp as m\nm()",
    ],
)
def test_the_test_sees_a_danger(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import torch\ntorch.load(p, **{'weights_only': True})",
        "import yaml\nyaml.safe_load(t)",
        "model.eval()",
        "import json\njson.loads(t)",
        "import re\nre.compile(t)",
        "import torch\ntorch.compile(module)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "import subprocess\nsubprocess.run([sys.executable, '-c', text])",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment\nImmutableSandboxedEnvironment()",
        "import tempfile\ntempfile.mkdtemp()",
        "options = {'trust_remote_code': pinned}",
    ],
)
def test_the_test_sees_none_where_none_is(source):
    assert not dangers(source)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
class TestFile:
    def test_runs_nothing_that_a_file_could_bring(self, path):
        found = dangers(path.read_text("utf-8"))
        allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), "nothing")
        assert [danger for danger in found if not danger.endswith(allowed)] == []

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
            "BusyError", "Compared", "Comparison", "DataError", "DivergedError", "Evidence", "InterruptedRunError", "MetierError", "ModelError",
            "Recipe", "RecipeError", "Run", "Several", "StorageError", "UnsafeError", "ValueTask", "__version__", "check", "compare",
            "compare_tasks", "init", "load", "plan", "plan_comparison", "resolve", "train",
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
