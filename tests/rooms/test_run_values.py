"""Jobs on cells and on a user's own rows, end to end: pretraining, tuning both ways, loading, predicting, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_cells import anndata, synthetic, write_h5mu, write_pair

import metier
from metier.core import DataError, ModelError, RecipeError
from metier.models import sctranslator
from metier.models.sctranslator import ScTranslator, Shape
from metier.recipe import Recipe
from metier.run import prepare, strength

OWN = """
import torch
from metier import ValueTask

class Net(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner, self.head = torch.nn.Linear(3, width), torch.nn.Linear(width, 2)

    def forward(self, x_BF):
        return self.head(torch.tanh(self.inner(x_BF)))

class Sums(ValueTask):
    names = ("sum", "difference")

    def example(self, row):
        return [float(row[k]) for k in "abc"], [float(row[k]) for k in self.names]

    def batch(self, contents):
        return {"x_BF": torch.tensor([x for x, _ in contents])}, torch.tensor([y for _, y in contents])

    def features(self, contents):
        return torch.tensor([x for x, _ in contents]).numpy()

class NoTask:
    pass

class Broken(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "made":
            raise RuntimeError("no luck")
        self.how = how

    def forward(self, x_BF):
        y = super().forward(x_BF)
        if self.how == "raises":
            raise KeyError("k")
        ways = {"tuple": (y, y), "none": None, "scalar": y.mean(), "rows": y[:-1], "one": y[:, :1], "whole": y.long()}
        ways["apart"] = y.detach()
        return ways[self.how]

class Odd(Sums):
    def __init__(self, how: str) -> None:
        self.how = how

    def example(self, row):
        if self.how == "row":
            return [][3]
        return super().example(row)

    def batch(self, contents):
        inputs, target = super().batch(contents)
        ways = {"list": [1], "fewer": (inputs, target[:, :1]), "inf": (inputs, target / 0), "name": ({"y": target}, target)}
        return ways.get(self.how, (inputs, target))

    def size(self, example):
        return 0 if self.how == "size" else 1

    def groups(self, records):
        return {"part": ["a"]} if self.how == "groups" else {}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sets of cells with partly other genes and proteins, a tiny scTranslator, and rows of a user's own."""
    root = tmp_path_factory.mktemp("values")
    for name, seed, columns in (("first", 0, slice(0, 36)), ("second", 1, slice(4, 40))):
        rna, proteins = synthetic(cells=160, seed=seed)
        rna = rna[:, columns].copy()
        rna.var["my_Id"] = np.arange(1, 37)
        proteins.var["my_Id"] = np.arange(41, 47)
        write_h5mu(root / f"{name}.h5mu", rna=rna, prot=proteins)
    torch.manual_seed(0)
    shape = Shape(dim=8, genes=40, proteins=8, bridge=16, vocabulary=60, heads=2, head_dim=4, features=12)
    torch.save(sctranslator.to_original(ScTranslator(shape)), root / "original.pt")
    (root / "own_sums.py").write_text(OWN)
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(90, 3)).round(4)
    text = "".join(
        json.dumps({"a": a, "b": b, "c": c, "sum": a + b + c, "difference": a - b}) + "\n" for a, b, c in rows.tolist()
    )
    (root / "rows.jsonl").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


def cells_job(name, base, data="second.h5mu", **sections):
    tree = {
        "model": {"base": str(base), "device": "cpu"},
        "data": {"train": data, "validation": 0.2, "test": 0.3},
        "task": "cells",
        "method": "full",
        "train": {"learning_rate": 1e-3, "epochs": 2, "batch_size": 16, "evaluations": 2},
        "evaluate": {"rows": None},
        "export": {"folder": f"runs/{name}"},
    }
    return tree | sections


@pytest.fixture(scope="module")
def pretrained(place):
    train = {"learning_rate": 2e-3, "epochs": 6, "batch_size": 16}
    return metier.train(cells_job("pretrained", "new:cells", "first.h5mu", train=train))


LORA = {"kind": "lora", "rank": 2}


@pytest.fixture(scope="module")
def tuned(pretrained):
    done = {}

    def get(method):
        if method not in done:
            done[method] = metier.train(cells_job(method, pretrained.path, method=LORA if method == "lora" else method))
        return done[method]

    return get


class TestCells:
    def test_pretraining_has_no_before_but_baselines_and_parts(self, pretrained):
        evidence = pretrained.evidence
        assert evidence.primary == "pearson_target"
        assert all(measure.before is None for measure in evidence.measures)
        assert {"mean_profile", "ridge", "pls", "kernel_ridge", "nearest"} <= {b.name for b in evidence.baselines}
        assert {part.by for part in evidence.breakdowns} == {"protein", "donor", "cell_type"}
        assert [scatter.key for scatter in evidence.scatters] == [f"p{i}" for i in range(6)]
        assert evidence.answers

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_tuning_is_measured_before_and_after_here_and_where_it_came_from(self, tuned, method):
        evidence = tuned(method).evidence
        measures = {measure.name: measure for measure in evidence.measures}
        assert measures["pearson_target"].before is not None
        assert measures["general_pearson_target"].group == "retention"
        assert measures["general_pearson_target"].title.endswith("pretraining set")
        assert measures["drift"].after.value > 0
        assert "calibrated" in {baseline.name for baseline in evidence.baselines}
        assert any("known from pretraining" in note for note in evidence.notes)

    def test_the_last_block_and_the_fitted_head_can_move_alone(self, pretrained):
        run = metier.train(cells_job("frozen", pretrained.path, method={"kind": "freeze", "blocks": 1}))
        assert 0 < run.evidence.cost.parameters_moved < run.evidence.cost.parameters_total
        assert "last 1 of 2 blocks" in run.evidence.setting.method

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_loaded_it_measures_the_same(self, tuned, method):
        run = tuned(method)
        told = {m.name: m.after.value for m in run.evidence.measures if m.group == "domain"}
        found = {m.name: m.after.value for m in run.load().evaluate()}
        assert found.keys() == told.keys()
        assert all(found[name] == pytest.approx(told[name], rel=1e-9) for name in told)

    def test_in_another_process_the_answers_have_the_same_bits(self, tuned, place):
        for method in ("full", "lora"):
            specialist = tuned(method).load()
            here = specialist.predict("second.h5mu").obsm["protein_predicted"]
            code = (
                f"import metier, numpy as np; a = metier.load('runs/{method}').predict('second.h5mu'); "
                "np.save('there.npy', a.obsm['protein_predicted'])"
            )
            subprocess.run([sys.executable, "-c", code], check=True, cwd=place, capture_output=True)
            assert np.array_equal(here, np.load(place / "there.npy"))

    def test_anndata_in_and_out_is_left_as_it_was(self, tuned):
        rna, _ = synthetic(cells=20, seed=5)
        before = rna.X.copy()
        out = tuned("lora").load().predict(rna)
        assert "protein_predicted" not in rna.obsm
        assert (before != rna.X).nnz == 0
        assert out.obsm["protein_predicted"].shape == (20, 6)
        assert list(out.uns["metier"]["proteins"]) == [f"p{i}" for i in range(6)]
        assert out.uns["metier"]["transform"] == "clr"

    def test_the_run_has_its_history(self, tuned):
        history = tuned("full").load().history
        assert {"step", "loss", "kind"} <= set(history.columns)
        assert (history.kind == "validation").sum() >= 2

    def test_a_file_is_streamed_into_another(self, tuned, place):
        rna, proteins = synthetic(cells=30, seed=6)
        source, _ = write_pair(place, rna, proteins)
        specialist = tuned("full").load()
        assert specialist.predict_file(source, place / "out.h5ad") == 30
        written = anndata.read_h5ad(place / "out.h5ad")
        assert np.array_equal(written.obsm["protein_predicted"], specialist.predict(rna).obsm["protein_predicted"])

    def test_the_merged_network_is_the_tuned_one_and_can_be_tuned_on(self, pretrained, place):
        run = metier.train(
            cells_job("merging", pretrained.path, method=LORA, export={"folder": "runs/merging", "merge": True})
        )
        again = metier.train(cells_job("on_merged", "runs/merging/merged", task={"kind": "cells", "calibrate": False}))
        after = {m.name: m.after.value for m in run.evidence.measures}
        before = {m.name: m.before.value for m in again.evidence.measures if m.before}
        assert before["rmse_target"] == pytest.approx(after["rmse_target"], rel=1e-4)

    @pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("lora", 2e-3)])
    def test_a_floor_chooses_a_share_by_cells_that_report_nothing(self, pretrained, method, rate):
        def run(floor):
            train = {"learning_rate": rate, "epochs": 2, "batch_size": 16, "evaluations": 1, "retain": floor}
            task, how = {"kind": "cells", "calibrate": False}, LORA if method == "lora" else method
            return metier.train(
                cells_job(f"floor-{method}-{floor}", pretrained.path, task=task, method=how, train=train)
            ).evidence

        free, floored = run(None), run(0.99)
        assert [one.share for one in floored.strengths] == list(strength.SHARES)
        assert floored.strengths[0].kept < 0.99, "the whole update must cost something for this test to say anything"
        (chosen,) = (one for one in floored.strengths if one.chosen)
        assert chosen.share < 1
        assert chosen.kept >= 0.99
        # What was chosen on the base's validation cells also shows on its test cells.
        before, after = (
            next(m.after.value for m in one.measures if m.name == "general_mse") for one in (free, floored)
        )
        assert after < before

    def test_where_something_was_fitted_before_none_of_the_update_is_a_share(self, pretrained):
        train = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 16, "evaluations": 1, "retain": 0.9}
        found = metier.train(cells_job("fitted-floor", pretrained.path, train=train)).evidence.strengths
        assert [one.share for one in found] == [*strength.SHARES, 0.0]
        assert found[-1].gain == pytest.approx(0, abs=1e-6)

    def test_what_is_kept_is_told_beside_the_base_as_it_came(self, pretrained):
        job = prepare(Recipe.model_validate(cells_job("beside", pretrained.path)))
        model = job.load()
        before = job.measure(model, model.module, base=None)
        kept = job.keeping(model, model.module, before)
        assert kept() == 1
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.mul_(0.5)
        # Whoever asks later is told of the same base.
        assert job.keeping(model, model.module, before)() == kept() < 1

    def test_a_guard_is_judged_at_matched_gain(self, pretrained):
        found = metier.compare(
            cells_job(
                "guarded",
                pretrained.path,
                task={"kind": "cells", "calibrate": False},
                train={"learning_rate": 1e-3, "epochs": 2, "batch_size": 16, "evaluations": 1},
                compare={"methods": ["full", "full+l2_sp=0.1"], "seeds": 2, "trials": 0},
            )
        ).comparison
        (guard,) = found.guards
        assert guard.name == "l2_sp"
        for arm in found.arms:
            assert arm.kept is not None
            assert all([one.share for one in cell.strengths] == [0.3, 0.5, 0.7, 0.85, 1.0] for cell in arm.cells)
        for cell in found.arms[0].cells:
            assert [one.kept for one in cell.strengths] != [1.0] * 5

    @pytest.mark.parametrize("evaluate", [{"retention": "off"}, {"retention": "first.h5mu"}])
    def test_a_floor_needs_cells_to_tell_by(self, pretrained, evaluate):
        tree = cells_job("told", pretrained.path, train={"retain": 0.9}, evaluate=evaluate)
        if evaluate["retention"] == "off":
            with pytest.raises(RecipeError, match="nothing tells what a model for cells must keep"):
                metier.check(tree)
        else:
            general = prepare(Recipe.model_validate(tree)).scene.general
            shared = {example.where for example in general.choosing} & {e.where for e in general.examples}
            assert (len(general.choosing), len(general.examples), shared) == (32, 128, set())

    def test_an_adapter_is_no_base(self, tuned):
        with pytest.raises(ModelError, match="adapter, not a whole network"):
            metier.check(cells_job("x", tuned("lora").path))

    def test_separate_files_share_no_cell(self, pretrained, place):
        data = {"train": "second.h5mu", "validation": 0.2, "test": "second.h5mu"}
        with pytest.raises(DataError, match="training cells also stand in test"):
            metier.check(cells_job("x", pretrained.path) | {"data": data})
        found = metier.check(cells_job("x", pretrained.path) | {"data": {**data, "overlap": "allow"}})
        assert any("flatter" in note for note in found.notes)

    def test_the_same_cell_is_found_whatever_the_order_of_its_genes(self, pretrained, place):
        rna, proteins = synthetic(cells=160, seed=1)
        rna = rna[:, list(range(39, 3, -1))].copy()
        write_h5mu(place / "reversed.h5mu", rna=rna[:60].copy(), prot=proteins[:60].copy())
        data = {"train": "second.h5mu", "validation": "reversed.h5mu", "test": 0.3}
        with pytest.raises(DataError, match="training cells also stand in validation"):
            metier.check(cells_job("x", pretrained.path) | {"data": data})
        found = metier.check(cells_job("x", pretrained.path) | {"data": {**data, "overlap": "drop"}})
        assert any("validation cells also stand in test" in note for note in found.notes)
        everything = {"train": "second.h5mu", "validation": 0.2, "test": "second.h5mu", "overlap": "drop"}
        with pytest.raises(DataError, match="no training cell is left"):
            metier.check(cells_job("x", pretrained.path) | {"data": everything})

    def test_cells_that_the_base_knows_already_are_told(self, pretrained):
        notes = metier.check(
            cells_job("x", pretrained.path, "first.h5mu")
            | {"data": {"train": "first.h5mu", "validation": 0.2, "test": 0.3, "group": "none"}}
        ).notes
        assert any("among those that the base learnt from" in note for note in notes)

    def test_another_scale_than_the_bases_is_told_and_kept(self, pretrained):
        run = metier.train(cells_job("logs", pretrained.path, task={"kind": "cells", "transform": "log1p"}))
        assert any("on another scale" in note for note in run.evidence.notes)
        again = metier.check(cells_job("x", run.path))
        assert again.task.transform.name == "log1p"

    def test_what_must_not_be_lost_is_not_lost_from_sight(self, pretrained):
        with pytest.raises(DataError, match=r"nowhere\.h5mu"):
            metier.check(cells_job("x", pretrained.path, evaluate={"retention": "nowhere.h5mu"}))
        with pytest.raises(RecipeError, match="is no set of cells"):
            metier.check(cells_job("x", pretrained.path, evaluate={"retention": "foo"}))

    def test_predicting_needs_the_genes_and_nothing_else(self, tuned, place):
        specialist = tuned("full").load()
        rna, _ = synthetic(cells=20, seed=8)
        del rna.obs["Donor_ID"]
        assert specialist.predict(rna).n_obs == 20
        rna.var_names = [f"ZZ{i}Y{i % 3}" for i in range(40)]
        with pytest.raises(DataError, match="0 of 40 genes"):
            specialist.predict(rna)
        other, proteins = synthetic(cells=30, seed=9)
        proteins.var_names = [f"q{i}" for i in range(6)]
        write_h5mu(place / "others.h5mu", rna=other, prot=proteins)
        with pytest.raises(DataError, match="none of the 6 proteins"):
            specialist.evaluate("others.h5mu")

    def test_where_no_step_was_kept_the_verdict_says_so(self, pretrained):
        train = {"learning_rate": 0.001, "max_steps": 2, "batch_size": 16}
        run = metier.train(cells_job("nothing_kept", pretrained.path, train=train))
        assert run.evidence.cost.best_step == 0
        assert "No step of tuning was kept" in run.evidence.verdict[0]
        assert "fitted" in {baseline.name for baseline in run.evidence.baselines}

    def test_loss_terms_are_the_recipes(self, pretrained):
        plain = metier.check(cells_job("x", pretrained.path))
        more = metier.check(
            cells_job("x", pretrained.path, task={"kind": "cells", "loss": "huber", "correlation": 0.5, "cosine": 0.5})
        )
        batch = plain.task.collate([plain.train[i] for i in range(8)])
        one, other = plain.task.loss(plain.model.module, batch), more.task.loss(plain.model.module, batch)
        assert torch.equal(one.weight_B, other.weight_B)
        assert not torch.allclose(one.total_B, other.total_B)

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_interrupted_and_resumed_it_ends_with_the_same_bits(self, pretrained, place, method):
        def command(name):
            train = {"learning_rate": 1e-3, "epochs": 60, "batch_size": 8, "evaluations": 4}
            tree = cells_job(name, pretrained.path, method=LORA if method == "lora" else method, train=train)
            (place / f"{name}.json").write_text(json.dumps(tree))
            return [sys.executable, "-m", "metier", "train", f"{name}.json", "--quiet"]

        subprocess.run(command(f"whole_{method}"), check=True, cwd=place, capture_output=True)
        folder = place / "runs" / f"cut_{method}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command(f"cut_{method}"), cwd=place, **quiet) as cut:
            while cut.poll() is None and steps(folder) < 20:
                time.sleep(0.01)
            cut.send_signal(signal.SIGTERM)
        assert cut.returncode == 75
        subprocess.run(command(f"cut_{method}"), check=True, cwd=place, capture_output=True)
        result = "adapter/adapter_model.safetensors" if method == "lora" else "model.safetensors"
        whole = place / "runs" / f"whole_{method}" / result
        assert (folder / result).read_bytes() == whole.read_bytes()


def steps(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count('"kind": "step"') if log.exists() else 0


class TestScTranslator:
    @pytest.mark.parametrize("method", ["full", {"kind": "lora", "rank": 2, "targets": ["to_q", "to_v"]}], ids=str)
    def test_is_tuned_as_in_the_tutorial_and_loads_again(self, place, method):
        name = method if isinstance(method, str) else "lora"
        train = {
            "learning_rate": 1e-3,
            "epochs": 2,
            "batch_size": 8,
            "optimizer": {"kind": "adam", "amsgrad": True},
            "schedule": {"kind": "step", "gamma": 0.5},
        }
        data = {"train": "first.h5mu", "validation": 0.2, "test": 0.3}
        tree = cells_job(f"sct_{name}", "original.pt", method=method, train=train) | {"data": data}
        run = metier.train(tree)
        assert run.load().recipe.task.kind == "cells"
        told = {m.name: m.after.value for m in run.evidence.measures if m.group == "domain"}
        found = {m.name: m.after.value for m in run.load().evaluate()}
        assert found["rmse_target"] == pytest.approx(told["rmse_target"], rel=1e-6)
        out = run.load().predict("first.h5mu")
        assert out.uns["metier"]["transform"] == "minmax"

    def test_the_result_goes_back_to_the_published_layout(self, place):
        data = {"train": "first.h5mu", "validation": 0.2, "test": 0.3}
        train = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
        export = {"folder": "runs/sct_back", "original": True}
        run = metier.train(cells_job("", "original.pt", train=train, export=export) | {"data": data})
        ours, theirs = sctranslator.load(run.path), sctranslator.read(run.path / "original.pt")
        for name, tensor in ours.state_dict().items():
            assert name == "draws" or torch.equal(tensor, theirs.state_dict()[name])
        before = sctranslator.read(place / "original.pt").encoder.identity.weight
        moved = (ours.encoder.identity.weight != before).any(dim=1)
        assert moved[1:37].any()
        assert not moved[47:].any()
        lora = {"export": {"folder": "runs/x", "original": True}, "method": "lora"}
        with pytest.raises(RecipeError, match=r"export\.merge=true"):
            metier.check(cells_job("x", "original.pt", **lora) | {"data": data})

    def test_the_tutorials_targets_are_answered(self, place):
        method = {"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]}
        data = {"train": "first.h5mu", "validation": 0.2, "test": 0.3}
        with pytest.raises(RecipeError, match="did you mean to_q"):
            metier.plan(cells_job("x", "original.pt", method=method) | {"data": data})

    def test_a_panel_that_is_too_long_is_refused_with_the_counts(self, place):
        rna, proteins = synthetic(cells=60, genes=50, seed=3)
        rna.var["my_Id"], proteins.var["my_Id"] = np.arange(1, 51), np.arange(51, 57)
        write_h5mu(place / "wide.h5mu", rna=rna, prot=proteins)
        with pytest.raises(ModelError, match=r"50 genes.* 40"):
            metier.check(cells_job("x", "original.pt", "wide.h5mu"))
        metier.check(cells_job("x", "original.pt", "wide.h5mu", task={"kind": "cells", "longer": "sample"}))


def own_job(name, **sections):
    return {
        "model": {"base": "new", "use": "own_sums:Net", "arguments": {"width": 16}, "device": "cpu"},
        "data": {"train": "rows.jsonl", "validation": 0.1, "test": 0.2},
        "task": {"kind": "own", "use": "own_sums:Sums"},
        "method": "full",
        "train": {"learning_rate": 0.03, "epochs": 20, "batch_size": 8, "evaluations": 3},
        "export": {"folder": f"runs/{name}"},
    } | sections


class TestOwn:
    def test_any_network_learns_any_numbers(self, place):
        run = metier.train(own_job("own"))
        measures = {m.name: m for m in run.evidence.measures}
        assert run.evidence.primary == "mse"
        assert measures["mse"].before is None
        assert measures["mse"].after.value < 0.2
        assert {"mean_profile", "ridge"} <= {b.name for b in run.evidence.baselines}
        answer = run.load().predict([{"a": 1.0, "b": 0.5, "c": 0.0}])[0]
        assert answer["sum"] == pytest.approx(1.5, abs=0.7)
        found = {m.name: m.after.value for m in run.load().evaluate()}
        assert found["mse"] == pytest.approx(measures["mse"].after.value, rel=1e-9)

    def test_from_weights_of_its_own_by_lora(self, place):
        metier.train(own_job("own_base"))
        model = {"base": "runs/own_base", "use": "own_sums:Net", "arguments": {"width": 16}, "device": "cpu"}
        run = metier.train(own_job("own_lora", model=model, method={"kind": "lora", "rank": 2}))
        measures = {m.name: m for m in run.evidence.measures}
        assert measures["mse"].before is not None
        assert run.load().predict([{"a": 0.0, "b": 0.0, "c": 0.0}])

    def test_where_nothing_is_pretrained_an_adapter_has_nothing_to_adapt(self, place):
        with pytest.raises(RecipeError, match="nothing here is pretrained"):
            metier.train(own_job("own_nothing", method="lora"))

    def test_the_head_alone_can_move(self, place):
        metier.train(own_job("own_base"))
        model = {"base": "runs/own_base", "use": "own_sums:Net", "arguments": {"width": 16}, "device": "cpu"}
        with pytest.raises(RecipeError, match="nothing would move"):
            metier.train(own_job("own_freeze", model=model, method={"kind": "freeze", "blocks": 0}))

    def test_the_command_line_predicts_rows(self, place):
        metier.train(own_job("own"))
        done = subprocess.run(
            [sys.executable, "-m", "metier", "predict", "runs/own", "--data", "rows.jsonl"],
            check=True,
            cwd=place,
            capture_output=True,
            text=True,
        )
        first = json.loads(done.stdout.splitlines()[0])
        assert set(first["prediction"]) == {"sum", "difference"}

    def test_its_plan_counts_what_moves(self, place):
        metier.train(own_job("own_base"))
        model = {"base": "runs/own_base", "use": "own_sums:Net", "arguments": {"width": 16}, "device": "cpu"}
        plan = metier.plan(own_job("x", model=model))
        assert {method.kind for method in plan.methods} == {"full", "lora"}
        assert plan.method("full").share_moved == 1

    @pytest.mark.parametrize(
        ("sections", "words"),
        [
            ({"task": {"kind": "own", "use": "own_sums:Other"}}, "has no Other"),
            ({"task": {"kind": "own", "use": "nowhere_at_all:Other"}}, "cannot import nowhere_at_all"),
            ({"task": {"kind": "own", "use": "own_sums:NoTask"}}, "no metier.ValueTask"),
            ({"model": {"base": "new", "use": "own_sums:Net", "arguments": {"depth": 1}}}, "it takes"),
            ({"model": {"base": "new", "use": "own_sums:Sums"}}, "made no torch.nn.Module"),
            ({"model": {"base": "new"}}, "needs a network of your own"),
            ({"evaluate": {"retention": "foo"}}, "may lose is not measured"),
        ],
    )
    def test_what_cannot_be_used_is_told(self, place, sections, words):
        with pytest.raises(RecipeError, match=words):
            metier.check(own_job("x", **sections))

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ("made", r"making own_sums:Broken raised RuntimeError at .*own_sums.py:\d+: no luck"),
            ("raises", r"the task's loss raised KeyError at .*own_sums.py:\d+"),
            ("tuple", "the network answers with a tuple"),
            ("none", "the network answers with a NoneType"),
            ("scalar", r"the network answers with the shape \(\)"),
            ("rows", r"the network answers with the shape \(1, 2\)"),
            ("one", r"the network answers with the shape \(2, 1\)"),
            ("whole", "the network answers with dtype torch.int64"),
            ("apart", "the answer has no gradient"),
        ],
    )
    def test_a_broken_network_is_told_before_anything_begins(self, place, how, words):
        model = {"base": "new", "use": "own_sums:Broken", "arguments": {"how": how}, "device": "cpu"}
        with pytest.raises((RecipeError, ModelError), match=words):
            metier.check(own_job("x", model=model))

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ("row", "IndexError"),
            ("list", "batch returns no pair"),
            ("fewer", r"targets of the shape \(2, 1\) for 2 rows and 2 names"),
            ("inf", "targets are infinite"),
            ("name", "unexpected keyword argument 'y'"),
            ("size", "size is no whole number"),
            ("groups", "groups do not have one value"),
        ],
    )
    def test_a_broken_task_is_told_before_anything_begins(self, place, how, words):
        task = {"kind": "own", "use": "own_sums:Odd", "arguments": {"how": how}}
        with pytest.raises((RecipeError, DataError), match=words):
            metier.check(own_job("x", task=task))

    def test_a_file_that_python_cannot_read_is_told_with_its_line(self, place):
        (place / "own_broken.py").write_text("class Net(:\n")
        with pytest.raises(RecipeError, match=r"raised SyntaxError at .*own_broken.py:1"):
            metier.check(own_job("x", task={"kind": "own", "use": "own_broken:Net"}))

    def test_another_class_under_the_same_name_is_not_the_tuned_one(self, place):
        changed = OWN.replace("self.head = ", "self.top = ").replace("self.head(", "self.top(")
        (place / "own_other.py").write_text(OWN.replace("own_sums", "own_other"))
        tree = own_job("own_other", model={"base": "new", "use": "own_other:Net", "device": "cpu"})
        tree["task"] = {"kind": "own", "use": "own_other:Sums"}
        metier.train(tree)
        (place / "own_other.py").write_text(changed)
        done = subprocess.run(
            [sys.executable, "-m", "metier", "predict", "runs/own_other", "--data", "rows.jsonl"],
            check=False,
            cwd=place,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "is not the class that was tuned" in done.stderr

    def test_changed_code_measures_the_base_again(self, place):
        from metier.models import source_digest

        (place / "own_digest.py").write_text("class A:\n    pass\n")
        first = source_digest("own_digest:A")
        (place / "own_digest.py").write_text("class A:\n    x = 1\n")
        assert source_digest("own_digest:A") != first

    def test_every_row_that_cannot_be_read_is_told_at_once(self, place):
        rows = [{"a": 1, "b": 2, "c": 3, "sum": 6, "difference": -1}] * 20
        rows = [dict(row, a=i) for i, row in enumerate(rows)]
        rows[4]["a"] = "many"
        del rows[7]["c"]
        (place / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError) as caught:
            metier.check(own_job("x") | {"data": {"train": "bad.jsonl"}})
        assert {fault.where for fault in caught.value.faults} == {"bad.jsonl:5", "bad.jsonl:8"}
