"""The story end to end on tiny models: what a run folder holds, and what happens when it is entered again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

import metier
from metier import evaluation, models, run, training
from metier.core import BusyError, RecipeError, StorageError
from metier.evaluation import METRICS
from metier.planning import Machine
from metier.recipe import parse
from metier.run.folder import RunFolder, find_runs
from metier.run.foresee import settle
from metier.run.lock import claim, holder

TEAMS = ("billing", "delivery", "returns")
ALWAYS = {"job.yaml", "job.resolved.yaml", "metrics.jsonl", "env.json", "evidence.json", "README.md", "report.html"}
ALWAYS |= {"metier.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("METIER_CACHE", str(path))
        yield path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and data of every kind."""
    root = tmp_path_factory.mktemp("run")
    for name in ("llama", "bert", "t5"):
        tiny.make(name, root / name)
    rows = [(f"Message {i}: the order {i * 37} came {i % 9} days late", TEAMS[i % 3]) for i in range(48)]
    chat = [
        {
            "messages": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": json.dumps({"team": a, "n": i})},
            ]
        }
        for i, (q, a) in enumerate(rows)
    ]
    write(root / "chat.jsonl", chat)
    write(root / "class.jsonl", [{"text": q, "label": a} for q, a in rows])
    write(root / "text.jsonl", [{"text": f"{q}. It went to {a}. " * 3} for q, a in rows])
    return root


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def job(place: Path, name: str, **sections) -> dict:
    model, data, task, method = CASES[name]
    tree = {
        "model": {"base": str(place / model), "device": "cpu"},
        "data": {"train": str(place / data), "overlap": "allow"},
        "task": task,
        "method": method,
        "train": {"max_steps": 4, "batch_size": 8, "evaluations": 2, "learning_rate": 0.01},
        "evaluate": {"max_new_tokens": 6, "rows": 6, "retention": "neutral-en"},
        "export": {"folder": str(place / "runs" / name)},
    }
    for section, keys in sections.items():
        tree[section] = {**tree[section], **keys} if isinstance(tree[section], dict) else keys
    return tree


CASES = {
    "chat-lora": ("llama", "chat.jsonl", "chat", {"kind": "lora", "rank": 2}),
    "chat-full": ("llama", "chat.jsonl", "chat", "full"),
    "text-freeze": ("llama", "text.jsonl", "complete", {"kind": "freeze", "blocks": 1}),
    "head-full": ("bert", "class.jsonl", "classify", "full"),
    "head-lora": ("bert", "class.jsonl", "classify", {"kind": "lora", "rank": 2}),
    "words-lora": ("llama", "class.jsonl", {"kind": "classify", "way": "words"}, {"kind": "lora", "rank": 2}),
    "t5-full": ("t5", "chat.jsonl", "chat", "full"),
    "t5-lora": ("t5", "chat.jsonl", "chat", {"kind": "lora", "rank": 2}),
}


@pytest.fixture(scope="module")
def trained(place):
    """Every case once, in order, when it is first asked for."""
    done: dict[str, metier.Run] = {}

    def get(name: str) -> metier.Run:
        if name not in done:
            done[name] = metier.train(job(place, name))
        return done[name]

    return get


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def notes(capsys) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
class TestFolder:
    def test_holds_everything_and_nothing_left_over(self, trained, name):
        path = trained(name).path
        names = {p.name for p in path.iterdir()}
        assert names >= ALWAYS
        assert ("adapter" in names) == ("lora" in name)
        assert ("model.safetensors" in names) == ("lora" not in name)
        assert ("chat_template.jinja" in names) == ("llama" in CASES[name][0])
        assert not names & {".lock", "checkpoints"}
        if "lora" in name:
            assert {"adapter_config.json", "adapter_model.safetensors"} <= {
                p.name for p in (path / "adapter").iterdir()
            }
        assert not list(path.rglob(".*"))

    def test_evidence_tells_the_run(self, place, trained, name):
        evidence = trained(name).evidence
        assert evidence.cost.steps == 4
        assert [phase.name for phase in evidence.cost.phases][:5] == [
            "read",
            "load",
            "measure before",
            "train",
            "measure after",
        ]
        assert evidence.setting.rows_measured <= 6
        assert evidence.setting.rows_train + evidence.setting.rows_validation + evidence.setting.rows_test == 48
        assert 0 < evidence.cost.parameters_moved <= evidence.cost.parameters_total
        assert (evidence.cost.parameters_moved == evidence.cost.parameters_total) == ("full" in name)
        assert evidence.cost.bytes_on_disk > 0
        measures = {measure.name: measure for measure in evidence.measures}
        assert evidence.primary in measures
        assert {"domain"} <= {measure.group for measure in evidence.measures}
        retained = {measure.name for measure in evidence.measures if measure.group == "retention"}
        expected = {"llama": {"text_en"}, "bert": {"paraphrase_en", "drift"}, "t5": set()}[CASES[name][0]]
        assert expected <= retained
        assert bool(retained) == bool(expected)

    def test_a_new_head_is_not_compared(self, trained, name):
        measures = [m for m in trained(name).evidence.measures if m.group == "domain"]
        new = name.startswith("head")
        assert all((m.verdict == "not compared") == new for m in measures)
        assert all((m.before is None) == new for m in measures)

    def test_log_holds_every_step(self, trained, name):
        lines = [json.loads(line) for line in (trained(name).path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
        assert [line["step"] for line in lines if line["kind"] == "validation"] == [0, 2, 4]

    def test_resolved_recipe_is_the_recipe(self, place, trained, name):
        resolved = metier.resolve(trained(name).path / "job.resolved.yaml")
        budget = resolved.train.micro_batch_tokens
        assert isinstance(budget, int)
        assert resolved == parse(job(place, name, train={"micro_batch_tokens": budget}))

    def test_answers_after_loading_are_the_answers_in_the_evidence(self, trained, name):
        evidence, specialist = trained(name).evidence, trained(name).load()
        again = {measure.name: measure.after for measure in specialist.evaluate()}
        for measure in evidence.measures:
            if measure.group == "domain":
                assert again[measure.name].value == pytest.approx(measure.after.value, rel=1e-5, abs=1e-7)
        if evidence.answers:
            rows = [answer.prompt for answer in evidence.answers]
            assert specialist.predict(rows) == [answer.after for answer in evidence.answers]

    def test_names_no_person_and_no_place_in_the_environment(self, trained, name):
        text = (trained(name).path / "env.json").read_text()
        assert str(Path.home()) not in text
        assert socket.gethostname() not in text


class TestAgain:
    def test_same_command_says_finished_and_changes_nothing(self, place, trained, capsys):
        path = trained("chat-lora").path
        before = state_of(path)
        notes(capsys)
        metier.train(job(place, "chat-lora"))
        assert "this run is finished" in notes(capsys)
        assert state_of(path) == before

    def test_another_recipe_is_refused_with_the_difference(self, place, trained):
        path = trained("chat-lora").path
        before = state_of(path)
        with pytest.raises(RecipeError) as caught:
            metier.train(job(place, "chat-lora", train={"learning_rate": 0.02}))
        assert caught.value.exit_code == 2
        assert "train.learning_rate: 0.01 -> 0.02" in str(caught.value)
        assert state_of(path) == before

    def test_what_changes_no_figure_may_change(self, place, trained):
        metier.train(job(place, "chat-lora", export={"license": "mit", "checkpoints": 3, "language": "zh"}))

    def test_a_folder_of_something_else_is_refused(self, place, trained):
        trained("chat-lora")
        folder = place / "photos"
        folder.mkdir()
        (folder / "cat.jpg").write_bytes(b"x")
        with pytest.raises(StorageError, match=r"cat\.jpg"):
            metier.train(job(place, "chat-lora", export={"folder": str(folder)}))
        assert [p.name for p in folder.iterdir()] == ["cat.jpg"]

    def test_the_same_job_elsewhere_gives_the_same_bits(self, place, trained):
        again = metier.train(job(place, "chat-lora", export={"folder": str(place / "runs" / "again")}))
        first = trained("chat-lora").path / "adapter" / "adapter_model.safetensors"
        assert (again.path / "adapter" / "adapter_model.safetensors").read_bytes() == first.read_bytes()
        assert again.evidence.measures == trained("chat-lora").evidence.measures


class TestBudget:
    def auto(self, place, name, folder):
        found = run.prepare(parse(job(place, name)))
        return settle(found, RunFolder(folder)).recipe.train.micro_batch_tokens

    def test_the_plan_says_what_the_run_takes(self, place, trained):
        found = metier.plan(job(place, "chat-lora"))
        assert found.budget.tokens == trained("chat-lora").load().recipe.train.micro_batch_tokens
        assert found.budget.reason
        # Eight rows of a step, as they were cut.
        sizes = run.prepare(parse(job(place, "chat-lora"))).sizes()
        assert min(sizes) < found.micro_batch_tokens <= found.budget.tokens <= 8 * max(sizes)

    def test_a_run_that_goes_on_keeps_its_number_whatever_memory_is_free(self, place, trained, tmp_path, monkeypatch):
        before = trained("text-freeze").load().recipe.train.micro_batch_tokens
        assert self.auto(place, "text-freeze", tmp_path / "new") == before > 512
        scarce = Machine(device="cpu", memory_bytes=10**6)
        monkeypatch.setattr("metier.planning.plans.this_machine", lambda _: scarce)
        assert self.auto(place, "text-freeze", trained("text-freeze").path) == before
        assert self.auto(place, "text-freeze", tmp_path / "new") == 512

    def test_the_next_plan_says_what_the_run_took_and_is_right(self, place, trained):
        evidence = trained("head-full").evidence
        found = metier.plan(job(place, "head-full"))
        method = found.method("full")
        assert method.basis == "measured"
        assert "full on 20" in found.notes[0]
        used = next(phase.peak_memory_bytes for phase in evidence.cost.phases if phase.name == "train")
        # The training phase ends a little later than its steps, with the best weights put back.
        assert method.peak_bytes == pytest.approx(used, rel=0.1)
        steps = training.read_metrics(trained("head-full").path / "metrics.jsonl")[1:]
        rates = [line["seconds"] / line["tokens"] for line in steps if line["kind"] == "step"]
        assert min(rates) * found.tokens <= method.seconds <= max(rates) * found.tokens

    def test_what_the_recipe_says_is_not_touched(self, place, tmp_path):
        found = run.prepare(parse(job(place, "chat-lora", train={"micro_batch_tokens": 100})))
        assert settle(found, RunFolder(tmp_path / "new")) is found


HOLD = """
import sys, pathlib
from metier.run.lock import claim
with claim(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held(folder: Path):
    """Another process writes to the folder."""
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        if other.poll() is None:
            other.communicate("\n")


class TestLock:
    def test_a_living_process_is_respected(self, place, tmp_path):
        with held(tmp_path) as other:
            with pytest.raises(BusyError, match=f"process {other.pid}") as caught:
                metier.train(job(place, "chat-lora", export={"folder": str(tmp_path)}))
            assert caught.value.exit_code == 73
            assert holder(tmp_path / ".lock")["pid"] == other.pid
        assert not (tmp_path / ".lock").exists()
        assert holder(tmp_path / ".lock") is None

    def test_a_killed_process_is_taken_over(self, tmp_path):
        with held(tmp_path) as other:
            other.kill()
            other.wait()
        assert (tmp_path / ".lock").exists()
        assert holder(tmp_path / ".lock") is None
        with claim(tmp_path / ".lock") as left:
            assert left
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert not (tmp_path / ".lock").exists()

    def test_the_number_of_a_dead_process_may_be_anothers_now(self, tmp_path):
        lock(tmp_path, 1)
        with claim(tmp_path / ".lock"):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()

    def test_another_machine_is_respected(self, tmp_path):
        lock(tmp_path, 1, host="elsewhere")
        with pytest.raises(BusyError, match="elsewhere"), claim(tmp_path / ".lock"):
            pass
        assert holder(tmp_path / ".lock")["host"] == "elsewhere"

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
    def test_a_lock_that_was_cut_off_is_taken_over(self, tmp_path, content):
        (tmp_path / ".lock").write_text(content)
        with claim(tmp_path / ".lock") as left:
            assert left

    def test_an_error_inside_gives_it_back(self, tmp_path):
        with pytest.raises(ZeroDivisionError), claim(tmp_path / ".lock"):
            _ = 1 / 0
        assert not (tmp_path / ".lock").exists()

    def test_of_many_at_once_one_wins(self, tmp_path):
        lock(tmp_path, 1)
        program = HOLD.replace("sys.stdin.readline()", "import time; time.sleep(3)")
        others = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(tmp_path / ".lock")],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for _ in range(5)
        ]  # fmt: skip
        said = [other.communicate()[0] for other in others]
        # Whoever begins after another has ended finds the folder free; two at a time never do.
        assert said.count("held\n") >= 1


def lock(folder: Path, pid: int, host: str = "") -> None:
    (folder / ".lock").write_text(json.dumps({"host": host or socket.gethostname(), "pid": pid}))


def test_an_adapter_of_a_base_in_bf16_stays_in_float32(place, tmp_path):
    metier.train(
        job(place, "chat-lora", train={"precision": "bf16"}, data={"seed": 7}, export={"folder": str(tmp_path / "run")})
    )
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        kinds = {adapter.get_tensor(name).dtype for name in adapter.keys()}  # noqa: SIM118 - it is no dict
    assert kinds == {torch.float32}


class TestBaseMeasurement:
    def test_another_method_does_not_measure_the_base_again(self, place, trained, capsys, cache):
        trained("chat-lora")
        kept = {p: p.stat().st_mtime_ns for p in cache.rglob("measured.json")}
        notes(capsys)
        tree = job(place, "chat-lora", export={"folder": str(place / "runs" / "freeze")})
        second = metier.train({**tree, "method": {"kind": "freeze", "blocks": 1}})
        assert "figures are taken from the cache" in notes(capsys)
        assert {p: p.stat().st_mtime_ns for p in cache.rglob("measured.json")} == kept
        first = {m.name: m.before for m in trained("chat-lora").evidence.measures}
        assert {m.name: m.before for m in second.evidence.measures} == first

    @pytest.mark.parametrize(
        "change",
        [
            {"train": {"precision": "bf16"}},
            {"evaluate": {"rows": 5}},
            {"evaluate": {"max_new_tokens": 7}},
            {"data": {"seed": 1}},
            {"task": {"kind": "chat", "system": "Be brief."}},
        ],
        ids=str,
    )
    def test_what_changes_its_figures_measures_it_again(self, place, trained, capsys, change):
        trained("chat-lora")
        prepared = run.prepare(parse(job(place, "chat-lora", **change)))
        model = models.load(prepared.recipe.model, head=prepared.head, seed=0)
        if change.get("train"):
            model.module.bfloat16()
        notes(capsys)
        from metier.run.story import measure_base

        measure_base(prepared, model)
        assert "measuring the base on" in notes(capsys)

    def test_a_changed_schema_file_measures_it_again(self, place, tmp_path, capsys):
        from metier.evaluation import metrics
        from metier.run.story import measure_base

        schema, test = tmp_path / "reply.schema.json", tmp_path / "test.jsonl"
        write(test, [{"prompt": f"Where is parcel {i}?", "completion": f'["{i}"]'} for i in range(6)])
        said = []
        for most in (1, 2, 2):
            schema.write_text(json.dumps({"type": "array", "maxItems": most}))
            metrics._validator.cache_clear()
            sections = {"data": {"test": str(test)}, "evaluate": {"json_schema": str(schema)}}
            prepared = run.prepare(parse(job(place, "chat-lora", **sections)))
            measure_base(prepared, models.load(prepared.recipe.model, head=prepared.head, seed=0))
            said.append("measuring the base on" in notes(capsys))
        assert said == [True, True, False]

    @pytest.mark.parametrize("name", ["chat-lora", "chat-full", "words-lora", "t5-lora"])
    def test_before_is_what_an_untouched_base_reaches(self, place, trained, name):
        """Measured on the base as plain transformers loads it, by nothing of the run but its rows and its task."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        evidence = trained(name).evidence
        prepared = run.prepare(parse(job(place, name)))
        auto = AutoModelForSeq2SeqLM if "t5" in name else AutoModelForCausalLM
        base = auto.from_pretrained(place / CASES[name][0], dtype="float32")
        section = prepared.recipe.evaluate.model_copy(update={"baselines": False})
        tokenizer = models.load_tokenizer(prepared.recipe.model)
        measured = evaluation.measure(prepared.task, base, tokenizer, prepared.test, section, prepared.pack, base=None)
        found = {m.name: m.after for m in evaluation.compare(None, measured, 0.95)}
        before = {m.name: m.before for m in evidence.measures if m.before is not None}
        assert found.keys() == before.keys()
        for key, estimate in before.items():
            assert estimate.value == pytest.approx(found[key].value, rel=1e-6), key
            assert (estimate.low, estimate.high) == pytest.approx((found[key].low, found[key].high), rel=1e-5), key
        assert [answer.before for answer in evidence.answers] == list(measured.answers)

    def test_the_base_on_disk_is_untouched(self, place, trained):
        trained("chat-full")
        again = tiny.make("llama", place / "llama-again")
        assert (again / "model.safetensors").read_bytes() == (place / "llama" / "model.safetensors").read_bytes()


class TestEvidence:
    def test_changes_are_paired_by_row(self, trained):
        evidence = trained("chat-full").evidence
        for measure in evidence.measures:
            if measure.change is not None and measure.before is not None:
                expected = measure.after.value - measure.before.value
                assert measure.change.value == pytest.approx(expected, abs=1e-9)
                assert measure.change.low <= measure.change.value <= measure.change.high

    def test_tuning_lowers_the_loss_it_was_trained_on(self, trained):
        for name in ("chat-lora", "chat-full", "text-freeze"):
            loss = next(m for m in trained(name).evidence.measures if m.name == "loss")
            assert loss.verdict == "better", name

    def test_exact_match_is_what_the_answers_say(self, trained):
        evidence = trained("chat-full").evidence
        exact = next(m for m in evidence.measures if m.name == "exact_match")
        assert exact.after.value == np.mean([answer.after_right for answer in evidence.answers])
        assert all(name in METRICS for name in ("exact_match",))

    def test_merged_model_is_written_on_request(self, place):
        tree = job(place, "chat-lora", export={"folder": str(place / "runs" / "merged"), "merge": True})
        path = metier.train(tree).path
        assert (path / "merged" / "model.safetensors").exists()
        assert (path / "adapter").exists()


class TestFind:
    def test_runs_below_a_folder_newest_first(self, place, trained):
        trained("chat-lora")
        found = find_runs(place)
        assert {p.path.name for p in found} >= {"chat-lora"}
        times = [r.resolved.stat().st_mtime for r in found]
        assert times == sorted(times, reverse=True)

    def test_no_run_folder(self, tmp_path):
        assert find_runs(tmp_path) == []
        with pytest.raises(RecipeError, match="not a run folder"):
            metier.load(tmp_path)

    def test_unfinished_run_is_not_loaded(self, place, trained, tmp_path):
        (tmp_path / "job.resolved.yaml").write_text((trained("chat-lora").path / "job.resolved.yaml").read_text())
        with pytest.raises(RecipeError, match="not finished") as caught:
            metier.load(tmp_path)
        assert "metier train" in caught.value.faults[0].hint


class TestMemory:
    def test_a_step_inside_the_backward_pass_gives_the_same_result(self, place):
        usual, early = (
            metier.train(
                job(
                    place,
                    "chat-full",
                    train={"max_grad_norm": None, "optimizer": {"during_backward": inside}},
                    export={"folder": str(place / f"inside-{inside}")},
                )
            )
            for inside in (False, True)
        )
        assert [(usual.path / "model.safetensors").read_bytes()] == [(early.path / "model.safetensors").read_bytes()]

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
    @pytest.mark.filterwarnings("ignore")  # torch's compiler has some of its own
    def test_a_probe_tells_what_compiling_gives(self, place):
        found = metier.plan(job(place, "chat-full", train={"compile": True, "batch_size": 4}), probe=True)
        assert any(note.startswith("compiling took ") for note in found.notes)
        assert found.method("full").basis == "probe"

    def test_activations_are_computed_again_on_request_and_said_so(self, place, trained, capsys):
        usual = trained("chat-full")
        job_again = job(
            place, "chat-full", train={"activation_checkpointing": "on"}, export={"folder": str(place / "again")}
        )
        found = metier.train(job_again)
        assert "activations are computed again in the backward pass: about " in notes(capsys)
        losses = [[line["loss"] for line in training.read_metrics(r.path / "metrics.jsonl")] for r in (usual, found)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
