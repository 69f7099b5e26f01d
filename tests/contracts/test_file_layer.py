"""Every file that metier writes goes through one file layer, so that faults can be tried there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import metier

ROOT = Path(metier.__file__).parent
ELSEWHERE = {
    "core/files.py": "is the file layer",
    "core/meter.py": "writes to /proc",
    "cli.py": "keeps a traceback when nothing else can be relied on",
    "data/disk.py": "has nameless files that end with the process",
    "data/files.py": "has nameless files that end with the process",
    "models/template_worker.py": "is another process, which writes to its own output",
    "models/lean/trunk.py": "has nameless files that end with the process",
    "evaluation/sandbox.py": "has a folder of its own for a program that is thrown away",
    "run/lock.py": "holds an open file, not content",
}
"""Files that write by themselves, and why."""
WRITERS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "rmtree", "rename", "touch", "mkstemp", "mkdtemp"}
WRITERS |= {"NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "save_file"}


def writes(source: str) -> list[str]:
    """Calls that write, remove or move files."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rsplit(".", 1)[-1]
        modes = [
            a.value
            for a in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
            if isinstance(a, ast.Constant)
        ]
        opens = last in {"open", "fdopen"} and any(
            isinstance(mode, str) and re.fullmatch(r"[rb+]*[wax][b+]*|r?b?\+b?", mode) for mode in modes
        )
        ours = name.startswith(("files.", "disk.", "commits."))
        if (last in WRITERS and not ours) or opens:
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "p.write_text('x')",
        "open('f', 'w')",
        "p.open('ab')",
        "p.open(mode='r+b')",
        "shutil.rmtree(p)",
        "p.rename(q)",
        "save_file(t, p)",
        "os.fdopen(h, 'wb')",
    ],
)
def test_the_test_sees_a_write(source):
    assert writes(source)


@pytest.mark.parametrize(
    "source", ["p.open('rb')", "open('f')", "files.write_text(p, t)", "write_json(p, v)", "text.replace('a', 'b')"]
)
def test_the_test_sees_none_where_none_is(source):
    assert not writes(source)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_writes_through_the_file_layer(path):
    if path.relative_to(ROOT).as_posix() not in ELSEWHERE:
        # The layer's own function has the name of a method that would pass it by.
        assert not [line for line in writes(path.read_text("utf-8")) if not line.endswith(": write_text")]
