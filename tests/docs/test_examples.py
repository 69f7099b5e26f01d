"""The example of a network and a task of one's own runs, on RXNMapper's real encoder, and learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import metier

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PARTS = (("Br", "Cl", "I"), ("c1ccccc1", "c1ccncc1", "c1ccc2ncccc2c1"), ("CN(C)C", "CCO", "O", "C1CCOC1"))


def reactions():
    """Rows whose yield follows from what stands in the reaction."""
    found = []
    for i, halide in enumerate(PARTS[0]):
        for j, ring in enumerate(PARTS[1]):
            for k, solvent in enumerate(PARTS[2]):
                rxn = f"{halide}{ring}.{solvent}.OB(O)c1ccccc1>>c1ccc(-{ring})cc1"
                found.append({"rxn": rxn, "yield": 0.1 + 0.3 * i / 2 + 0.3 * j / 2 + 0.2 * k / 3})
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    package = pytest.importorskip("importlib.util").find_spec("rxnmapper")
    if package is None:
        pytest.skip("the package rxnmapper, which carries the encoder, is not installed")
    weights = next((Path(package.origin).parent / "models").rglob("pytorch_model.bin"))
    (tmp_path / "rxnmapper").symlink_to(weights.parent)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "suzuki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reactions()))
    shutil.copy(EXAMPLES / "yields.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_reaction_yields(place, method):
    tree = yaml.safe_load((EXAMPLES / "yields.yaml").read_text("utf-8"))
    tree["method"] = method
    tree["data"] |= {"validation": 0.2, "test": 0.2}
    tree["train"] |= {"epochs": 3, "batch_size": 8}
    run = metier.train(tree)
    mse = next(m for m in run.evidence.measures if m.name == "mse")
    before, after = (line["loss"] for line in losses(run.path) if line["step"] in {0, last(run.path)})
    assert after < before
    assert mse.after.value < 1
    assert 0 < run.load().predict(reactions()[:2])[0] < 2


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"]


def last(folder):
    return losses(folder)[-1]["step"]
