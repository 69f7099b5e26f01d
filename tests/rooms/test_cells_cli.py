"""Cells on the command line: a first recipe, and every bad table told in one message before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from made_cells import synthetic, write_h5mu, write_pair

from metier.recipe import parse


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cells")
    rna, proteins = synthetic()
    write_h5mu(root / "good.h5mu", rna=rna, prot=proteins)
    return root


def metier(place, *words):
    return subprocess.run(
        [sys.executable, "-m", "metier", *words], cwd=place, capture_output=True, text=True, check=False
    )


def check(place, data, **sections):
    tree = {"model": {"base": "new:cells"}, "data": data, "task": "cells", "method": "full"} | sections
    (place / "job.json").write_text(json.dumps(tree))
    return metier(place, "check", "job.json")


def refused(done, code, *words):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_first_recipe_is_written_from_the_table(place):
    done = metier(place, "init", "--model", "new:cells", "--data", "good.h5mu")
    assert done.returncode == 0, done.stderr
    recipe = parse(yaml.safe_load(done.stdout))
    assert (recipe.task.kind, recipe.method.kind, recipe.evaluate.rows) == ("cells", "full", None)


def test_a_recipe_goes_to_a_folder_of_its_own_name_and_needs_a_model_that_is_there(place):
    done = metier(place, "init", "--model", "new:cells", "--data", "good.h5mu", "--output", "pretrain.yaml")
    assert done.returncode == 0, done.stderr
    assert parse(yaml.safe_load((place / "pretrain.yaml").read_text())).export.folder == "runs/pretrain"
    refused(metier(place, "init", "--model", "nowhere", "--data", "good.h5mu"), 65, "no such folder or file")


def test_check_shows_cells_and_what_is_learnt(place):
    done = check(place, {"train": "good.h5mu"})
    assert done.returncode == 0, done.stderr
    assert "120 cells, 40 genes, 6 proteins" in done.stdout
    assert "every cell of donor" in " ".join(done.stdout.split())
    assert "[[p0 " in done.stdout
    told = json.loads(metier(place, "check", "job.json", "--json").stdout)
    assert told["task"] == "cells"
    assert told["rows"]["train"] + told["rows"]["validation"] + told["rows"]["test"] == 120


def test_the_plan_says_what_it_cannot_know(place):
    check(place, {"train": "good.h5mu"})
    done = metier(place, "plan", "job.json")
    assert done.returncode == 0, done.stderr
    assert "--probe" in done.stdout
    probed = metier(place, "plan", "job.json", "--probe", "--json")
    assert json.loads(probed.stdout)["methods"][0]["basis"] == "probe"


class TestBadTables:
    def test_no_file_no_table_a_cut_table(self, place):
        refused(check(place, {"train": "nowhere.h5mu"}), 65, "nowhere.h5mu")
        (place / "text.h5mu").write_text("cells")
        refused(check(place, {"train": "text.h5mu"}), 65, "text.h5mu", "HDF5")
        whole = (place / "good.h5mu").read_bytes()
        (place / "cut.h5mu").write_bytes(whole[: len(whole) // 2])
        refused(check(place, {"train": "cut.h5mu"}), 65, "cut.h5mu")

    def test_cells_that_are_not_shared(self, place):
        rna, proteins = synthetic()
        proteins.obs_names = [f"other{i}" for i in range(120)]
        write_pair(place, rna, proteins)
        done = check(place, {"train": "rna.h5ad", "proteins": "proteins.h5ad"})
        refused(done, 65, "never matched by position")

    def test_mouse_genes_normalised_negative_and_missing_values(self, place):
        rna, proteins = synthetic()
        mouse = rna.copy()
        mouse.var_names = [f"ENSMUSG{i:011d}" for i in range(40)]
        write_h5mu(place / "mouse.h5mu", rna=mouse, prot=proteins)
        refused(check(place, {"train": "mouse.h5mu"}), 65, "mouse")
        for name, change in {
            "log": lambda x: np.log1p(x * 1e4 / x.sum(1, keepdims=True)),
            "negative": lambda x: x - 1,
            "missing": lambda x: np.where(x > 3, np.nan, x),
        }.items():
            changed = rna.copy()
            changed.X = change(rna.X.toarray()).astype(np.float32)
            write_h5mu(place / f"{name}.h5mu", rna=changed, prot=proteins)
            refused(check(place, {"train": f"{name}.h5mu"}), 65, f"{name}.h5mu")

    def test_a_network_that_is_not_there_and_one_of_another_kind(self, place):
        refused(check(place, {"train": "good.h5mu"}, model={"base": "runs/nowhere"}), 65, "no such folder or file")
        (place / "config.json").write_text('{"architectures": ["BertModel"]}')
        refused(check(place, {"train": "good.h5mu"}, model={"base": "."}), 65, "no network for cells")

    def test_unknown_genes_are_counted(self, place):
        tree = {
            "model": {"base": "new:cells"},
            "data": {"train": "good.h5mu"},
            "task": "cells",
            "method": "full",
            "train": {"max_steps": 2},
            "evaluate": {"baselines": False},
            "export": {"folder": "runs/known"},
        }
        (place / "known.json").write_text(json.dumps(tree))
        assert metier(place, "train", "known.json", "--quiet").returncode == 0
        rna, proteins = synthetic(genes=40)
        rna.var_names = [f"ZZ{i}Y{i % 3}" for i in range(40)]
        write_h5mu(place / "strange.h5mu", rna=rna, prot=proteins)
        done = check(place, {"train": "strange.h5mu"}, model={"base": "runs/known"})
        refused(done, 65, "0 of 40 genes (0%)", "task.overlap")

    def test_files_of_another_kind_and_a_conversation(self, place):
        self.test_unknown_genes_are_counted(place)
        refused(metier(place, "predict", "runs/known", "--data", "good.h5mu", "--output", "out.csv"), 2, "h5ad")
        refused(metier(place, "predict", "runs/known", "--data", "rows.jsonl"), 2, "no file of cells")
        refused(metier(place, "chat", "runs/known"), 2, "no replies")

    def test_ids_of_the_published_network_are_counted_and_unique(self, place):
        import torch

        from metier.models import sctranslator

        shape = sctranslator.Shape(8, 40, 8, 16, vocabulary=60, heads=2, head_dim=4, features=12)
        torch.save(sctranslator.to_original(sctranslator.ScTranslator(shape)), place / "sct.pt")
        rna, proteins = synthetic()
        proteins.var["my_Id"] = range(41, 47)
        for name, ids in {"few": [*range(1, 11), *[0] * 30], "twice": [1, 1, *range(2, 40)]}.items():
            rna.var["my_Id"] = ids
            write_h5mu(place / f"{name}.h5mu", rna=rna, prot=proteins)
        refused(check(place, {"train": "few.h5mu"}, model={"base": "sct.pt"}), 65, "10 of 40 genes have an id")
        refused(check(place, {"train": "twice.h5mu"}, model={"base": "sct.pt"}), 65, "several genes")

    def test_a_misspelt_key(self, place):
        refused(check(place, {"train": "good.h5mu"}, task={"kind": "cells", "transfrom": "clr"}), 2, "transform")
