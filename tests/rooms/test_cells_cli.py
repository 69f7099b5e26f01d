"""Cells on the command line: a first recipe, and every bad table told in one message before anything is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from made_cells import synthetic, write_h5mu, write_pair

from metier import api
from metier.recipe import parse


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cells")
    rna, proteins = synthetic()
    write_h5mu(root / "good.h5mu", rna=rna, prot=proteins)
    return root


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_tables(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def check(place, metier):
    """`metier check` of a job on a table."""

    def call(data, **sections):
        tree = {"model": {"base": "new:cells"}, "data": data, "task": "cells", "method": "full"} | sections
        (place / "job.json").write_text(json.dumps(tree))
        return metier("check", "job.json")

    return call


@pytest.fixture(scope="module")
def known(place):
    """A network that was trained on the good table."""
    tree = {
        "model": {"base": "new:cells"},
        "data": {"train": str(place / "good.h5mu")},
        "task": "cells",
        "method": "full",
        "train": {"max_steps": 2},
        "evaluate": {"baselines": False},
        "export": {"folder": str(place / "runs" / "known")},
    }
    return api.train(tree).path


def refused(done, code, *words):
    assert done.code == code, done.err
    assert "Traceback" not in done.err + done.out
    for word in words:
        assert word in done.err, done.err


def test_a_first_recipe_is_written_from_the_table(metier):
    done = metier("init", "--model", "new:cells", "--data", "good.h5mu")
    assert done.code == 0, done.err
    recipe = parse(yaml.safe_load(done.out))
    assert (recipe.task.kind, recipe.method.kind, recipe.evaluate.rows) == ("cells", "full", None)


def test_a_recipe_goes_to_a_folder_of_its_own_name_and_needs_a_model_that_is_there(place, metier):
    done = metier("init", "--model", "new:cells", "--data", "good.h5mu", "--output", "pretrain.yaml")
    assert done.code == 0, done.err
    assert parse(yaml.safe_load((place / "pretrain.yaml").read_text())).export.folder == "runs/pretrain"
    refused(metier("init", "--model", "nowhere", "--data", "good.h5mu"), 65, "no such folder or file")


def test_check_shows_cells_and_what_is_learnt(check, metier):
    done = check({"train": "good.h5mu"})
    assert done.code == 0, done.err
    assert "120 cells, 40 genes, 6 proteins" in done.out
    assert "every cell of donor" in " ".join(done.out.split())
    assert "[[p0 " in done.out
    told = json.loads(metier("check", "job.json", "--json").out)
    assert told["task"] == "cells"
    assert told["rows"]["train"] + told["rows"]["validation"] + told["rows"]["test"] == 120


def test_the_plan_says_what_it_cannot_know(check, metier):
    check({"train": "good.h5mu"})
    done = metier("plan", "job.json")
    assert done.code == 0, done.err
    assert "--probe" in done.out
    probed = metier("plan", "job.json", "--probe", "--json")
    assert json.loads(probed.out)["methods"][0]["basis"] == "probe"


class TestBadTables:
    def test_no_file_no_table_a_cut_table(self, place, check):
        refused(check({"train": "nowhere.h5mu"}), 65, "nowhere.h5mu")
        (place / "text.h5mu").write_text("cells")
        refused(check({"train": "text.h5mu"}), 65, "text.h5mu", "HDF5")
        whole = (place / "good.h5mu").read_bytes()
        (place / "cut.h5mu").write_bytes(whole[: len(whole) // 2])
        refused(check({"train": "cut.h5mu"}), 65, "cut.h5mu")

    def test_cells_that_are_not_shared(self, place, check):
        rna, proteins = synthetic()
        proteins.obs_names = [f"other{i}" for i in range(120)]
        write_pair(place, rna, proteins)
        done = check({"train": "rna.h5ad", "proteins": "proteins.h5ad"})
        refused(done, 65, "never matched by position")

    def test_mouse_genes_normalised_negative_and_missing_values(self, place, check):
        rna, proteins = synthetic()
        mouse = rna.copy()
        mouse.var_names = [f"ENSMUSG{i:011d}" for i in range(40)]
        write_h5mu(place / "mouse.h5mu", rna=mouse, prot=proteins)
        refused(check({"train": "mouse.h5mu"}), 65, "mouse")
        for name, change in {
            "log": lambda x: np.log1p(x * 1e4 / x.sum(1, keepdims=True)),
            "negative": lambda x: x - 1,
            "missing": lambda x: np.where(x > 3, np.nan, x),
        }.items():
            changed = rna.copy()
            changed.X = change(rna.X.toarray()).astype(np.float32)
            write_h5mu(place / f"{name}.h5mu", rna=changed, prot=proteins)
            refused(check({"train": f"{name}.h5mu"}), 65, f"{name}.h5mu")

    def test_a_network_that_is_not_there_and_one_of_another_kind(self, place, check):
        refused(check({"train": "good.h5mu"}, model={"base": "runs/nowhere"}), 65, "no such folder or file")
        (place / "config.json").write_text('{"architectures": ["BertModel"]}')
        refused(check({"train": "good.h5mu"}, model={"base": "."}), 65, "no network for cells")

    def test_unknown_genes_are_counted(self, place, known, check):
        rna, proteins = synthetic(genes=40)
        rna.var_names = [f"ZZ{i}Y{i % 3}" for i in range(40)]
        write_h5mu(place / "strange.h5mu", rna=rna, prot=proteins)
        done = check({"train": "strange.h5mu"}, model={"base": str(known)})
        refused(done, 65, "0 of 40 genes (0%)", "task.overlap")

    def test_files_of_another_kind_and_a_conversation(self, known, metier):
        refused(metier("predict", known, "--data", "good.h5mu", "--output", "out.csv"), 2, "h5ad")
        refused(metier("predict", known, "--data", "rows.jsonl"), 2, "no file of cells")
        refused(metier("chat", known), 2, "no replies")

    def test_ids_of_the_published_network_are_counted_and_unique(self, place, check):
        import torch

        from metier.models import sctranslator

        shape = sctranslator.Shape(8, 40, 8, 16, vocabulary=60, heads=2, head_dim=4, features=12)
        torch.save(sctranslator.to_original(sctranslator.ScTranslator(shape)), place / "sct.pt")
        rna, proteins = synthetic()
        proteins.var["my_Id"] = range(41, 47)
        for name, ids in {"few": [*range(1, 11), *[0] * 30], "twice": [1, 1, *range(2, 40)]}.items():
            rna.var["my_Id"] = ids
            write_h5mu(place / f"{name}.h5mu", rna=rna, prot=proteins)
        refused(check({"train": "few.h5mu"}, model={"base": "sct.pt"}), 65, "10 of 40 genes have an id")
        refused(check({"train": "twice.h5mu"}, model={"base": "sct.pt"}), 65, "several genes")

    def test_a_misspelt_key(self, check):
        refused(check({"train": "good.h5mu"}, task={"kind": "cells", "transfrom": "clr"}), 2, "transform")
