"""The documentation is true: what it shows runs or parses, its trees and tables are current, its languages agree."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer.main
import yaml
from made_cells import synthetic, write_h5mu

import metier
from metier.cli import app
from metier.core import RecipeError
from metier.recipe import files, parse

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "metier"
TOP = [ROOT / name for name in ("README.md", "README.zh-CN.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "llms.txt")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md")), *sorted((SOURCE / "assets").rglob("*.md"))]
COMMAND: Any = typer.main.get_command(app)
TASKS = ("chat", "complete", "classify", "cells")
EXAMPLE = (ROOT / "docs/examples/yields.py").read_text("utf-8")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def every(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{named(path)}-{number}")
        for path in PAGES
        for number, text in enumerate(blocks(path, language), 1)
    ]


def commands() -> list[Any]:
    """Every `metier ...` line of a bash block, and of inline code."""
    found = []
    for path in PAGES:
        lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        lines += re.findall(r"`(metier [a-z][^`]*)`", prose)
        found += [
            pytest.param(line, id=f"{named(path)}: {line}") for line in lines if re.match(r"(\S*/)?metier [a-z-]", line)
        ]
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


class TestCommands:
    def test_there_are_some(self):
        assert len(commands()) > 20

    @pytest.mark.parametrize("line", commands())
    def test_exist_with_their_options(self, line):
        words = words_of(line)
        if words[0].startswith("-"):
            assert words in (["--version"], ["--help"])
            return
        name, *rest = words
        assert name in COMMAND.commands
        if rest and "`" not in line:
            COMMAND.commands[name].make_context(name, rest)

    @pytest.mark.parametrize("line", commands())
    def test_set_keys_that_exist(self, line):
        name, *rest = words_of(line)
        for word in rest if name in {"check", "plan", "train"} else ():
            if re.match(r"[a-z_]+(\.[a-z_]+)*=", word):
                assert any(is_recipe({}, task, [word]) for task in TASKS), word

    def test_a_wrong_option_would_be_seen(self):
        with pytest.raises(Exception, match="base-model"):
            COMMAND.commands["init"].make_context("init", ["--base-model", "x"])
        assert not is_recipe({}, "chat", ["train.lr=1"])


def is_recipe(tree: dict, task: str, overrides: list[str]) -> bool:
    try:
        parse({"model": {"base": "-"}, "data": {"train": "-"}, "task": task, **tree}, overrides)
    except RecipeError:
        return False
    return True


@pytest.mark.parametrize("text", every("yaml"))
def test_every_recipe_shown_is_a_recipe(text):
    assert parse(yaml.safe_load(text)).export.folder.startswith("runs/")


@pytest.mark.parametrize("text", every("json"))
def test_every_row_shown_is_json(text):
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())


def test_every_format_shown_is_recognised_by_its_name(tmp_path):
    from metier.data import look

    page = (ROOT / "docs/how-to/own-data.md").read_text("utf-8")
    shown = re.findall(r"^\*\*(\w+)\*\*.*?^```(json|text)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {name for name, _, _ in shown} == {"messages", "sharegpt", "alpaca", "prompt", "text", "label"}
    for name, kind, text in shown:
        path = tmp_path / f"{name}.{'csv' if kind == 'text' else 'jsonl'}"
        path.write_text(text, "utf-8")
        assert look(path).format == name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the README's recipe was run on a tiny model, under every name that a snippet uses."""
    root = tmp_path_factory.mktemp("docs")
    tiny.make("llama", root / "model")
    teams = ("billing", "shipping", "returns")
    rows = [{"prompt": f"Message {i}: order {i * 37} is late", "completion": teams[i % 3]} for i in range(40)]
    (root / "data").mkdir()
    for name, count in (("train", 40), ("more", 3)):
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (root / "data" / f"{name}.jsonl").write_text(text, "utf-8")
    tree = yaml.safe_load(blocks(ROOT / "README.md", "yaml")[0])
    tree["model"] |= {"base": str(root / "model"), "device": "cpu"}
    tree["data"] |= {"overlap": "allow"}
    tree["train"] |= {"max_steps": 2, "batch_size": 4, "evaluations": 1}
    tree["evaluate"] |= {"rows": 3, "max_new_tokens": 4, "retention": "off"}
    (root / "job.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    rna, proteins = synthetic(cells=90)
    write_h5mu(root / "data" / "pbmc10k.h5mu", rna=rna, prot=proteins)
    rna.write_h5ad(root / "data" / "cells.h5ad")
    pretrain = yaml.safe_load((ROOT / "recipes/cells/cells_pretrain.yaml").read_text("utf-8"))
    pretrain["train"] |= {"epochs": 1}
    pretrain["export"] |= {"folder": "runs/cells"}
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setenv("METIER_CACHE", str(root / "cache"))
        metier.train("job.yaml")
        metier.train(pretrain)
        (root / "runs" / "chat").symlink_to(root / "runs" / "job")
        yield root


def test_the_whole_example_is_shown():
    assert EXAMPLE in blocks(ROOT / "docs/how-to/own-network.md", "python")


@pytest.mark.parametrize("text", [shown for shown in every("python") if shown.values[0] != EXAMPLE])
def test_every_snippet_runs(text, workplace, capsys):
    with contextlib.chdir(workplace):
        exec(compile(text, "snippet", "exec"), {})
    assert capsys.readouterr().out.strip()


class TestReadme:
    EN, ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"

    def test_each_links_to_the_other_in_its_first_line(self):
        assert "(README.zh-CN.md)" in self.EN.read_text("utf-8").splitlines()[0]
        assert "(README.md)" in self.ZH.read_text("utf-8").splitlines()[0]

    def test_the_two_commands_come_first(self):
        for path in (self.EN, self.ZH):
            text = path.read_text("utf-8")
            assert text.index("make demo") < text.index("# metier")

    def test_both_have_the_same_headings_blocks_links_and_list(self):
        for pattern in (r"^#+", r"^```.*?^```$", r"\]\((?!README|docs/(?:zh/)?start)[^)]*\)", r"^- ", r"^\| "):
            en, zh = (
                re.findall(pattern, path.read_text("utf-8"), re.MULTILINE | re.DOTALL) for path in (self.EN, self.ZH)
            )
            assert len(en) == len(zh), pattern
            assert pattern == r"^\| " or sorted(en) == sorted(zh), pattern

    def test_both_have_the_same_figures(self):
        en, zh = (sorted(re.findall(r"\d+(?:[.,]\d+)*", path.read_text("utf-8"))) for path in (self.EN, self.ZH))
        assert en == zh

    @pytest.mark.parametrize("path", [EN, ZH], ids=named)
    def test_the_tree_is_true(self, path):
        tree = next(block for block in blocks(path, "text") if block.startswith("src/metier/"))
        shown = {line.split()[0] for line in tree.splitlines()[1:]}
        there = {
            f"{entry.name}/" if entry.is_dir() else entry.name
            for entry in SOURCE.iterdir()
            if not entry.name.startswith(("_", ".")) and entry.name != "py.typed"
        }
        assert shown == there

    @pytest.mark.parametrize("path", [EN, ZH], ids=named)
    def test_has_a_place_for_the_measured_table(self, path):
        assert re.search(r"<!-- demo table -->.*<!-- /demo table -->", path.read_text("utf-8"), re.DOTALL)


def test_the_layers_of_architecture_are_those_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    checked = [line.replace("metier.", "") for line in contracts[0]["layers"]]
    assert blocks(ROOT / "ARCHITECTURE.md", "text")[0].splitlines() == checked


def test_every_link_leads_somewhere():
    broken = [f"{named(path)}: {link}" for path in PAGES for link in links(path) if not (path.parent / link).exists()]
    assert not broken


def links(path: Path) -> list[str]:
    """The links of a page's prose that stay inside the project."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose) if "://" not in link]


def test_every_page_is_in_the_index_and_every_file_named_is_there():
    index = (ROOT / "llms.txt").read_text("utf-8")
    missing = [
        named(p) for p in PAGES if named(p).startswith("docs/") and "/zh/" not in named(p) and named(p) not in index
    ]
    assert not missing
    for path in PAGES:
        for name in re.findall(r"`((?:tests|bench|docs|recipes)/[\w./-]+)`", path.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{named(path)}: {name}"


@pytest.mark.parametrize("name", ["recipe.md", "cli.md"])
def test_the_reference_is_current(name):
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (made.REFERENCE / name).read_text("utf-8") == made.PAGES[name](), "python docs/generate_reference.py"


def test_the_reference_has_every_key():
    page = (ROOT / "docs/reference/recipe.md").read_text("utf-8")
    for section in files.json_schema()["$defs"].values():
        for key in section["properties"]:
            assert key == "kind" or f"| `{key}` |" in page


def test_the_data_cards_count_right():
    assets = SOURCE / "assets"
    card = (assets / "support_desk" / "README.md").read_text("utf-8")
    for name in ("train", "validation", "test"):
        rows = (assets / "support_desk" / f"{name}.jsonl").read_text("utf-8").splitlines()
        urgencies = [json.loads(json.loads(row)["completion"])["urgency"] for row in rows]
        counts = " / ".join(str(urgencies.count(word)) for word in ("low", "normal", "high"))
        assert f"| `{name}.jsonl` | {len(rows)} | {len(rows) // 12} | {counts} |" in card
    items = [json.loads(row) for row in (assets / "retention" / "neutral.jsonl").read_text("utf-8").splitlines()]
    pack = (assets / "retention" / "README.md").read_text("utf-8")
    assert f"{len(items)} items" in pack
    assert f"{len(items)} items" in (ROOT / "docs/explain/evidence.md").read_text("utf-8")
    for kind in ("text", "reply", "choice", "triple"):
        en, zh = (sum((i["kind"], i["language"]) == (kind, language) for i in items) for language in ("en", "zh"))
        assert f"| `{kind}` | {en} | {zh} |" in pack


# Written in pieces, so that this file does not hold what it looks for.
FORBIDDEN = re.compile(
    r"\bse" r"ssions?\b|/wo" r"rk/|/tmp/ve" r"nv|\bissue[ _]trac" r"ker|\b(?:this|the|our|an) iss" r"ue\b|\bissue \d|\bsub-?ag" r"ents?\b",
    re.IGNORECASE,
)  # fmt: skip


def written() -> list[Path]:
    """What people wrote: every text file but data, generated figures and the names of packages."""
    kinds = {".py", ".md", ".yaml", ".txt", ".toml", ".html", ".css", ".cff", ".json"}
    folders = [ROOT / name for name in ("src", "tests", "docs", "bench", "recipes")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]
    top = [path for path in ROOT.glob("*.*") if path.name != "constraints.txt"]
    return [*found, *top, ROOT / "Makefile"]


def test_speaks_of_itself_alone():
    found = []
    for path in written():
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)
        if path.is_file() and not hidden:
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if match := FORBIDDEN.search(line):
                    found.append(f"{named(path)}:{number}: {match.group()}")
    assert not found


def test_the_makefile_has_what_the_documentation_names():
    made = (ROOT / "Makefile").read_text("utf-8")
    told = {word for path in PAGES for word in re.findall(r"\bmake (\w+)\b", " ".join(shown_code(path)))}
    assert {"demo", "test", "check"} <= told
    assert all(re.search(rf"^{target}:", made, re.MULTILINE) for target in told)
    assert subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, check=False).returncode == 0


def shown_code(path: Path) -> list[str]:
    return re.findall(r"`[^`]*`|^```.*?^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_tested_set_satisfies_what_the_project_asks_for():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line[:60]
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in [
        *project["dependencies"],
        *(line for name in ("demo", "schema", "bio", "dev") for line in extras[name]),
    ]:
        wanted = Requirement(line)
        assert pins[wanted.name.lower()] in wanted.specifier, line
