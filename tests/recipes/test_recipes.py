"""Every recipe that is shown runs end to end, on a tiny model and a few made rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import metier
from metier import demo
from metier.models import sctranslator
from metier.recipe import ChatTask, ClassifyTask, Recipe, load

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CELLS = sorted((ROOT / "recipes" / "cells").glob("*.yaml"))
JOBS = sorted((ROOT / "docs" / "evidence" / "jobs").glob("*.yaml"))
TEAMS = ("billing", "delivery", "returns")
URGENCIES = ("low", "normal", "high")
TINY_MIDDLE = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    for name in ("llama", "bert"):
        tiny.make(name, root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        yield root


def rows(recipe: Recipe) -> list[dict]:
    """Rows such as the recipe's comments ask for."""
    told = [(f"Message {i}: order {i * 37} came {i % 9} days late", TEAMS[i % 3]) for i in range(36)]
    if isinstance(recipe.task, ClassifyTask):
        return [{"text": text, "label": team} for text, team in told]
    if recipe.data.format == "alpaca":
        return [{"instruction": f"Which team? {text}", "output": team} for text, team in told]
    if recipe.evaluate.answer_after:
        return [{"prompt": f"What is {i} plus {i % 7}?", "completion": f"Add.\n#### {i + i % 7}"} for i in range(36)]
    if "messages" in recipe.data.train or "qwen3" in recipe.export.folder:
        turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": team}] for t, team in told]
        return [{"messages": turn} for turn in turns]
    if recipe.data.group == "file":
        return [
            {
                "prompt": f'def f{i}(x):\n    """Add {i}."""\n',
                "completion": f"    return x + {i}\n",
                "file": f"{i % 9}.py",
            }
            for i in range(36)
        ]
    if isinstance(recipe.task, ChatTask):
        replies = [{"intent": "track_order", "team": "shipping", "urgency": urgency} for urgency in URGENCIES]
        return [{"prompt": text, "completion": json.dumps(replies[i % 3])} for i, (text, _) in enumerate(told)]
    return [{"text": f"{text}. It went to {team}, as number {i} did. " * 3} for i, (text, team) in enumerate(told)]


def small(path: Path, place: Path) -> dict:
    """The recipe with a tiny model, made rows and two steps; everything else as it stands."""
    recipe, tree = load(path), yaml.safe_load(path.read_text("utf-8"))
    data = place / f"{path.stem}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(recipe)), "utf-8")
    encoder = isinstance(recipe.task, ClassifyTask) and recipe.task.way != "words"
    tree["model"] = {**tree["model"], "base": str(place / ("bert" if encoder else "llama")), "device": "cpu"}
    tree["data"] = {**tree["data"], "train": str(data), "validation": 0.1, "test": 0.1, "overlap": "allow"}
    if getattr(recipe.task, "max_tokens", None):
        tree["task"]["max_tokens"] = 256
    if getattr(recipe.task, "middle_tokens", None):
        tree["task"]["middle_tokens"] = TINY_MIDDLE
    tree["train"] = {**tree.get("train", {}), "max_steps": 2, "batch_size": 4, "evaluations": 1}
    tree["evaluate"] = {**tree.get("evaluate", {}), "rows": 3, "max_new_tokens": 4, "retention": "off"}
    if "json_schema" in tree["evaluate"]:
        tree["evaluate"]["json_schema"] = str(ROOT / tree["evaluate"]["json_schema"])
    tree["export"] = {**tree["export"], "folder": str(place / "runs" / path.stem)}
    return tree


def test_are_at_most_a_dozen():
    assert 1 <= len(RECIPES) <= 12


@pytest.mark.parametrize("path", [*RECIPES, *JOBS], ids=lambda path: path.stem)
class TestRecipe:
    def test_reads_as_it_stands(self, path):
        recipe = load(path)
        assert recipe.export.folder == f"runs/{path.stem}"
        assert path.read_text("utf-8").startswith("# ")

    def test_runs_on_a_tiny_model(self, path, place):
        run = metier.train(small(path, place))
        assert run.report.is_file()
        assert run.evidence.cost.steps == 2
        assert (run.path / "merged").is_dir() == load(path).export.merge


@pytest.fixture(scope="module")
def cells(place):
    """A table of cells with ids, a pretrained network and an scTranslator, where the recipes look for them."""
    from made_cells import synthetic, write_h5mu

    for folder in ("data", "checkpoints"):
        (place / folder).mkdir()
    rna, proteins = synthetic(cells=90)
    rna.var["my_Id"], proteins.var["my_Id"] = range(1, 41), range(41, 47)
    rna.obs = rna.obs.rename(columns={"Donor_ID": "patient", "celltype.l1": "annotation"})
    for name in ("pbmc10k", "donors", "cells"):
        write_h5mu(place / "data" / f"{name}.h5mu", rna=rna, prot=proteins)
    shape = sctranslator.Shape(8, 40, 8, 16, vocabulary=60, heads=2, head_dim=4, features=12)
    torch.save(sctranslator.to_original(sctranslator.ScTranslator(shape)), place / "checkpoints/scTranslator_2M.pt")
    return place


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_recipes_for_cells_run(path, cells, monkeypatch):
    monkeypatch.chdir(cells)
    recipe = load(path)
    assert recipe.export.folder == f"runs/{path.stem}"
    assert path.read_text("utf-8").startswith("# ")
    run = metier.train(recipe, "train.max_steps=2", "train.evaluations=1", "evaluate.rows=20")
    assert run.evidence.cost.steps == 2


@pytest.mark.parametrize("method", demo.METHODS)
def test_the_support_desk_is_the_demo(method):
    shown = load(ROOT / "recipes" / f"support_desk_{method}.yaml").model_dump()
    told = metier.resolve(demo.recipe(method, Path("runs"))).model_dump()
    for section in ("model", "task", "method", "train"):
        assert shown[section] == told[section]
    for name in ("train", "validation", "test"):
        assert (ROOT / shown["data"][name]).samefile(told["data"][name])
    assert (ROOT / shown["evaluate"].pop("json_schema")).samefile(told["evaluate"].pop("json_schema"))
    assert shown["evaluate"] == told["evaluate"]
