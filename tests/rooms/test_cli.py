"""The command line: words, exit codes, what goes to which stream, and that no mistake of a user ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

from metier import cli
from metier.core.log import set_quiet

COMMANDS = ("init", "check", "plan", "train", "compare", "evaluate", "predict", "chat", "runs", "schema", "demo")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, data and a cache."""
    root = tmp_path_factory.mktemp("cli")
    for name in ("llama", "bert"):
        tiny.make(name, root / name)
    rows = [
        (f"Message {i}: the order {i * 37} came {i % 9} days late", ("billing", "delivery", "returns")[i % 3])
        for i in range(60)
    ]
    chat = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": json.dumps({"team": a, "n": i})}]
        for i, (q, a) in enumerate(rows)
    ]
    write(root / "chat.jsonl", [{"messages": turns} for turns in chat])
    write(root / "class.jsonl", [{"text": q, "label": a} for q, a in rows])
    write(root / "text.jsonl", [{"text": f"{q}. Then number {i} went to {a}. " * 3} for i, (q, a) in enumerate(rows)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        patch.setenv("TMPDIR", str(root))
        yield root


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def metier(monkeypatch, capfd):
    """Call the command line in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words: object, stdin: str | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["metier", *map(str, words)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    yield call
    signal.signal(signal.SIGTERM, handler)
    set_quiet(quiet=False)


def recipe(place: Path, folder: str, task: str = "chat", model: str = "llama", data: str = "chat", **sections) -> Path:
    tree = {
        "model": {"base": str(place / model), "device": "cpu"},
        "data": {"train": str(place / f"{data}.jsonl"), "overlap": "allow"},
        "task": {"kind": task},
        "method": {"kind": "lora", "rank": 2},
        "train": {"max_steps": 2, "batch_size": 8, "evaluations": 1, "learning_rate": 0.01},
        "evaluate": {"max_new_tokens": 6, "rows": 4, "retention": "off"},
        "export": {"folder": str(place / "runs" / folder)},
    }
    for name, keys in sections.items():
        tree[name] = {**tree[name], **keys}
    path = place / f"{folder}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def runs(place):
    """One finished run of each task, trained by the command line."""
    made = {}
    for task, model, data in (("chat", "llama", "chat"), ("classify", "bert", "class"), ("complete", "llama", "text")):
        job = recipe(place, f"done-{task}", task, model, data)
        done = subprocess.run(
            [sys.executable, "-m", "metier", "train", str(job)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        made[task] = (place / "runs" / f"done-{task}", done)
    return made


def one_json(text: str):
    """The one JSON value that stdout must be."""
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:].strip() == ""
    return value


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_every_command(self, metier, command):
        done = metier(command, "--help")
        assert done.code == 0
        assert "Usage" in done.out
        assert metier(command, "-h").out == done.out

    def test_names_every_command(self, metier):
        done = metier("--help")
        assert done.code == 0
        assert all(f" {command} " in done.out for command in COMMANDS)
        assert metier().out == done.out

    def test_version(self, metier):
        from metier.core.version import __version__ as version

        assert metier("--version") == Done(0, f"metier {version}\n", "")

    @pytest.mark.parametrize(
        "words", [["--help"], ["train", "--help"], ["train", "missing.yaml"], ["schema"], ["runs", "nowhere"]]
    )
    def test_answers_without_anything_heavy(self, words):
        script = (
            "import sys\nfrom metier import cli\n"
            "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch','transformers','peft','scipy','sklearn','matplotlib','datasets','numpy'} & set(sys.modules)\n"
            "sys.exit(99 if heavy else 0)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_no_colour_where_it_is_not_wanted(self):
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
        environment.pop("FORCE_COLOR", None)
        done = subprocess.run(
            [sys.executable, "-m", "metier", "--help"], capture_output=True, check=False, env=environment
        )
        assert b"\x1b[3" not in done.stdout
        assert b"\x1b[9" not in done.stdout


GOOD_ROW = {"prompt": "a question", "completion": "an answer"}


def mistakes(place: Path) -> dict[str, tuple[list, int, str]]:
    """Name -> the words typed, the exit code, and what the message must name."""
    job = str(recipe(place, "mistake"))
    bad = place / "bad"
    bad.mkdir(exist_ok=True)
    cut = write(bad / "cut.jsonl", [GOOD_ROW, '{"prompt": "x", "completion": "y'])
    null = write(
        bad / "null.jsonl", [GOOD_ROW, {"prompt": "x", "completion": None}, {"prompt": None, "completion": "y"}]
    )
    columns = write(bad / "columns.jsonl", [{"ask": "x", "reply": "y"}] * 3)
    empty = write(bad / "empty.jsonl", [])
    long = write(
        bad / "long.jsonl", [{"prompt": f"Say {i}. " * 99, "completion": f"number {i} " * 99} for i in range(40)]
    )
    binary = bad / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00\x01" * 50)
    typo = bad / "typo.yaml"
    typo.write_text("model: {base: x}\ndata: {train: y}\ntask: chat\ntrain: {learning_rat: 1}\n")
    tabs = bad / "tabs.yaml"
    tabs.write_text("model:\n\tbase: x\n")
    (bad / "folder").mkdir(exist_ok=True)
    (bad / "folder" / "config.json").write_text("{}")

    def train(*overrides: str) -> list:
        return ["train", job, *overrides]

    return {
        "no command of this name": (["trian"], 2, "train"),
        "no recipe given": (["train"], 2, "JOB.YAML"),
        "unknown option": (["train", job, "--fats"], 2, "--fats"),
        "recipe is missing": (["train", bad / "none.yaml"], 2, "does not exist"),
        "recipe is a folder": (["check", bad], 2, "is a folder"),
        "recipe key misspelt": (["train", typo], 2, "learning_rate"),
        "recipe with tabs": (["train", tabs], 2, "tabs.yaml:2"),
        "recipe is the data": (["check", place / "chat.jsonl"], 2, "chat.jsonl"),
        "override without value": (train("train.epochs"), 2, "section.key=value"),
        "override misspelt": (train("train.epoch=3"), 2, "epochs"),
        "override of the wrong type": (train("train.batch_size=many"), 2, "batch_size"),
        "negative rate": (train("train.learning_rate=-1"), 2, "learning_rate"),
        "rate is no number": (train("train.learning_rate=.nan"), 2, "learning_rate"),
        "unknown method": (train("method=lorra"), 2, "lora"),
        "rank zero": (train("method.rank=0"), 2, "rank"),
        "target absent": (train("method.targets=[to_q]"), 2, "q_proj"),
        "model is missing": (train(f"model.base={bad / 'no-model'}"), 65, "no-model"),
        "model folder without weights": (train(f"model.base={bad / 'folder'}"), 65, "folder"),
        "model is a data file": (train(f"model.base={place / 'chat.jsonl'}"), 65, "chat.jsonl"),
        "encoder cannot chat": (train(f"model.base={place / 'bert'}"), 2, "classify"),
        "words of an encoder": (
            train(
                f"model.base={place / 'bert'}",
                "task={kind: classify, way: words}",
                f"data.train={place / 'class.jsonl'}",
            ),
            2,
            "head",
        ),
        "data is missing": (train(f"data.train={bad / 'none.jsonl'}"), 65, "none.jsonl"),
        "data is a folder": (train(f"data.train={bad}"), 65, str(bad)),
        "data is empty": (train(f"data.train={empty}"), 65, "empty"),
        "data is binary": (train(f"data.train={binary}"), 65, "binary.jsonl"),
        "line cut in two": (train(f"data.train={cut}"), 65, "cut.jsonl:2"),
        "value is null": (train(f"data.train={null}"), 65, "null.jsonl:3"),
        "unknown columns": (train(f"data.train={columns}"), 65, "ask"),
        "rows too long": (train(f"data.train={long}", "task.max_tokens=64"), 65, "task.max_tokens"),
        "more tokens than the model has": (train("task.max_tokens=100000"), 2, "512"),
        "schema is missing": (train("evaluate.json_schema=none.json"), 2, "none.json"),
        "retention pack is missing": (train("evaluate.retention=none.jsonl"), 2, "none.jsonl"),
        "template is missing": (train("task.template=none.jinja"), 2, "none.jinja"),
        "labels for a chat task": (train(f"data.train={place / 'class.jsonl'}"), 65, "class.jsonl"),
        "run is missing": (["evaluate", bad / "no-run"], 2, "not a run folder"),
        "chat with no run": (["chat", bad, "-m", "hi"], 2, "not a run folder"),
        "init without data": (["init", "-m", place / "llama", "-d", bad / "none.jsonl"], 65, "none.jsonl"),
        "init without model": (["init", "-m", bad / "none", "-d", place / "chat.jsonl"], 65, "none"),
        "init over a file": (["init", "-m", place / "llama", "-d", place / "chat.jsonl", "-o", job], 2, "exists"),
        "compare by too few rows": (["compare", job], 65, "test rows are too few"),
        "compare an unknown method": (["compare", job, "--methods", "lora,ful"], 2, "did you mean full"),
        "compare several tasks by methods": (["compare", job, job, "--budget", "2h"], 2, "are for one recipe"),
        "compare one method twice": (["compare", job, "--methods", "lora,lora"], 2, "stands twice"),
        "compare within no time": (["compare", job, "--budget", "soon"], 2, "20min"),
        "compare on a share that is none": (["compare", job, "--data-curve", "half"], 2, "25,50,100"),
        "compare on more than all": (["compare", job, "--data-curve", "25,150"], 2, "data_curve"),
        "gate is no number": (["evaluate", bad, "--fail-under", "exact_match"], 2, "METRIC=VALUE"),
        "gate is not finite": (["evaluate", bad, "--fail-under", "exact_match=nan"], 2, "METRIC=VALUE"),
    }


class TestMistakes:
    def test_each_ends_in_a_message_and_its_code(self, place, metier):
        wrong = []
        for name, (words, code, named) in mistakes(place).items():
            done = metier(*words)
            told = done.err + done.out
            errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
            checks = {
                "code": done.code == code, "names": named in told, "says error": bool(errors), "no traceback": "Traceback" not in told,
                "not a bug": "bug in metier" not in told, "silent stdout": done.out == "", "no folder": not (place / "runs" / "mistake" / "adapter").exists(),
            }  # fmt: skip
            wrong += [f"{name}: {check} ({done.code}): {told[-300:]}" for check, held in checks.items() if not held]
        assert not wrong, "\n".join(wrong)

    def test_with_json_the_same_is_one_json_value(self, place, metier):
        wrong = []
        for name, (words, code, named) in mistakes(place).items():
            done = metier(*words, "--json")
            try:
                found = one_json(done.out)
                good = found["exit_code"] == code == done.code and named in json.dumps(
                    found["faults"], ensure_ascii=False
                )
                good &= all(set(fault) == {"where", "what", "hint"} for fault in found["faults"])
            except (ValueError, KeyError) as error:
                good, found = False, error
            if not good:
                wrong.append(f"{name}: {done.code}: {found}")
        assert not wrong, "\n".join(map(str, wrong))

    def test_all_faults_of_a_file_at_once(self, place, metier):
        rows = [GOOD_ROW, "{", {"prompt": "x"}, GOOD_ROW, "[1]"]
        bad = write(place / "faults.jsonl", rows)
        done = metier("check", recipe(place, "faults"), f"data.train={bad}")
        assert done.code == 65
        assert {f"faults.jsonl:{line}:" in done.err for line in (2, 3, 5)} == {True}

    def test_a_crash_of_ours_says_so_and_keeps_the_traceback(self, metier, monkeypatch):
        def crash(*_):
            raise ZeroDivisionError("by\nzero")

        monkeypatch.setattr("metier.render.history.rows", crash)
        done = metier("runs", "--json")
        assert done.code == 1
        assert "bug in metier: ZeroDivisionError: by zero" in done.err
        assert "Traceback" not in done.err
        kept = Path(one_json(done.out)["faults"][0]["hint"].rsplit(" ", 1)[1])
        assert "Traceback" in kept.read_text()
        kept.unlink()

    def test_divergence_is_70_and_leaves_no_result(self, place, metier):
        job = recipe(
            place,
            "diverged",
            train={"learning_rate": 1e30, "max_steps": 20},
        )
        text = json.loads(job.read_text())
        text["method"] = {"kind": "full"}
        job.write_text(json.dumps(text))
        done = metier("train", job)
        assert done.code == 70, done.err
        assert "learning_rate" in done.err
        assert not (place / "runs" / "diverged" / "model.safetensors").exists()


class TestStreams:
    @pytest.mark.parametrize("task", ["chat", "classify", "complete"])
    def test_train_puts_results_on_stdout_and_events_on_stderr(self, runs, task):
        _, done = runs[task]
        assert "report" in done.stdout
        assert '"event"' not in done.stdout
        events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        assert {"note", "step", "validation"} <= {event["event"] for event in events}
        assert "Traceback" not in done.stderr

    def test_json_of_every_command(self, place, metier, runs, tmp_path):
        run, job = runs["chat"][0], place / "done-chat.yaml"
        questions = write(tmp_path / "q.txt", ["Where is it?", "Late again"])
        for words in (
            ["init", "-m", place / "llama", "-d", place / "chat.jsonl"],
            ["init", "-m", place / "llama", "-d", place / "chat.jsonl", "-o", tmp_path / "new.yaml"],
            ["check", job],
            ["plan", job],
            ["train", job],
            ["compare", job, "data.test=0.4", "data.validation=0.2", "evaluate.rows=null", "--plan-only"],
            ["evaluate", run],
            ["predict", run, "-d", questions],
            ["predict", run, "-d", questions, "-o", tmp_path / "answers.jsonl"],
            ["chat", run, "-m", "hello"],
            ["chat", run, "-m", "hello", "--base"],
            ["runs", place],
            ["schema"],
        ):
            done = metier(*words, "--json")
            assert done.code == 0, done.err
            assert isinstance(one_json(done.out), dict), words

    def test_quiet_leaves_stderr_to_warnings(self, place, metier, runs):
        done = metier("train", place / "done-chat.yaml", "--quiet")
        assert done.code == 0
        assert '"note"' not in done.err

    @pytest.mark.parametrize("of", ["evidence", "comparison"])
    def test_schemas_of_what_programs_read(self, metier, of):
        schema = one_json(metier("schema", of).out)
        assert "verdict" in schema["properties"]

    def test_schema_is_a_json_schema_of_recipes(self, place, metier):
        import jsonschema

        schema = one_json(metier("schema").out)
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        assert validator.is_valid(json.loads(recipe(place, "schema").read_text()))
        assert not validator.is_valid(
            {"model": {"base": "x"}, "data": {"train": "y"}, "task": {"kind": "chat"}, "trian": {}}
        )


class TestFirstSteps:
    @pytest.mark.parametrize(
        ("model", "data", "task"),
        [("llama", "chat", "chat"), ("bert", "class", "classify"), ("llama", "text", "complete")],
    )
    def test_init_check_train(self, place, metier, tmp_path, model, data, task):
        job = tmp_path / "job.yaml"
        assert metier("init", "-m", place / model, "-d", place / f"{data}.jsonl", "-o", job).code == 0
        fast = [
            "train.max_steps=1",
            "evaluate.rows=2",
            "evaluate.retention=off",
            "evaluate.max_new_tokens=4",
            "data.overlap=allow",
            "model.device=cpu",
        ]
        checked = metier("check", job, *fast)
        assert checked.code == 0, checked.err
        assert "no faults found" in checked.out
        assert "[[" in checked.out
        done = metier("train", job, *fast, f"export.folder={tmp_path / 'run'}")
        assert done.code == 0, done.err
        assert (tmp_path / "run" / "report.html").exists()
        assert f"kind: {task}" in (tmp_path / "run" / "job.resolved.yaml").read_text()

    def test_init_prints_what_it_would_write(self, place, metier, tmp_path):
        words = ("init", "-m", place / "llama", "-d", place / "chat.jsonl")
        printed = metier(*words).out
        metier(*words, "-o", tmp_path / "job.yaml")
        assert (tmp_path / "job.yaml").read_text().strip() == printed.strip()

    def test_plan_for_people(self, place, metier):
        done = metier("plan", recipe(place, "plan"))
        assert done.code == 0, done.err
        assert all(word in done.out for word in ("full fine-tuning", "LoRA", "peak memory"))

    def test_plan_with_a_probe(self, place, metier):
        done = metier("plan", recipe(place, "plan"), "--probe", "--json")
        assert done.code == 0, done.err
        by_kind = {method["kind"]: method["basis"] for method in one_json(done.out)["methods"]}
        assert by_kind["lora"] == "probe"
        assert by_kind["full"] != "probe"


class TestEvaluate:
    def test_gate_met_and_not_met(self, metier, runs):
        run = runs["chat"][0]
        loss = next(
            m["after"]["value"]
            for m in one_json(metier("evaluate", run, "--json").out)["measures"]
            if m["name"] == "loss"
        )
        assert metier("evaluate", run, "--fail-under", f"loss={loss + 0.1}").code == 0
        missed = metier("evaluate", run, "--fail-under", f"loss={loss - 0.1}", "--fail-under", "exact_match=1")
        assert missed.code == 3
        assert "--fail-under loss" in missed.err
        assert "--fail-under exact_match" in missed.err
        found = metier("evaluate", run, "--fail-under", "exact_match=1", "--json")
        assert found.code == 3
        value = one_json(found.out)
        assert value["exit_code"] == 3
        assert value["measures"]

    def test_unknown_metric(self, metier, runs):
        done = metier("evaluate", runs["chat"][0], "--fail-under", "exakt_match=1")
        assert done.code == 2
        assert "exact_match" in done.err

    def test_other_rows(self, place, metier, runs):
        others = write(
            place / "others.jsonl", [{"text": f"Late again, {i} times", "label": "returns"} for i in range(5)]
        )
        done = metier("evaluate", runs["classify"][0], "--data", others, "--json")
        assert done.code == 0, done.err
        assert one_json(done.out)["measures"][0]["after"]["n"] == 5


class TestAnswers:
    def test_predict_from_every_kind_of_file(self, metier, runs, tmp_path):
        run = runs["classify"][0]
        texts = ["The order came late", "Charged twice"]
        (tmp_path / "q.csv").write_text("id,text\n1,The order came late\n2,Charged twice\n")
        write(tmp_path / "q.jsonl", [{"text": text} for text in texts])
        write(tmp_path / "q.txt", [*texts, ""])
        answers = []
        for name in ("q.csv", "q.jsonl", "q.txt"):
            done = metier("predict", run, "--data", tmp_path / name)
            assert done.code == 0, done.err
            rows = [json.loads(line) for line in done.out.splitlines()]
            assert [row["text"] for row in rows] == texts
            answers.append([row["prediction"] for row in rows])
        done = metier("predict", run, "--data", "-", stdin="\n".join(texts))
        answers.append([json.loads(line)["prediction"] for line in done.out.splitlines()])
        assert answers[0] == answers[1] == answers[2] == answers[3]
        assert set(answers[0]) <= {"billing", "delivery", "returns"}

    def test_predict_keeps_the_other_columns_and_writes_a_file(self, metier, runs, tmp_path):
        write(tmp_path / "q.jsonl", [{"prompt": "Where is it?", "id": 7}])
        done = metier(
            "predict", runs["chat"][0], "-d", tmp_path / "q.jsonl", "-o", tmp_path / "a.jsonl", "--max-new-tokens", "3"
        )
        assert (done.code, done.out) == (0, "")
        row = json.loads((tmp_path / "a.jsonl").read_text())
        assert (row["id"], row["prompt"]) == (7, "Where is it?")
        assert "prediction" in row

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ("", "q.jsonl"),
            ('{"ask": "x"}\n', "ask"),
            ("{\n", "q.jsonl:1"),
            ('{"prompt": ""}\n', "question 1"),
            ('{"messages": ["x"]}\n', "question 1"),
        ],
    )
    def test_bad_questions(self, metier, runs, tmp_path, content, named):
        (tmp_path / "q.jsonl").write_text(content)
        done = metier("predict", runs["chat"][0], "-d", tmp_path / "q.jsonl")
        assert done.code == 65, done.err
        assert named in done.err

    def test_chat_with_the_base_beside_it(self, metier, runs):
        done = metier("chat", runs["chat"][0], "--message", "Where is my order?", "--base")
        assert done.code == 0, done.err
        assert done.out.startswith("base>  ")
        assert "\ntuned> " in done.out
        alone = metier("chat", runs["chat"][0], "--message", "Where is my order?")
        assert alone.out.strip() == done.out.split("\ntuned> ", 1)[1].strip()

    def test_chat_reads_lines(self, metier, runs):
        done = metier("chat", runs["chat"][0], "--json", stdin="Hello\n\nAnd now?\n")
        assert done.code == 0, done.err
        assert len([json.loads(line) for line in done.out.splitlines()]) == 2

    def test_chat_with_other_tasks(self, metier, runs):
        assert metier("chat", runs["classify"][0], "-m", "It is late").out.strip() in {"billing", "delivery", "returns"}
        assert metier("chat", runs["complete"][0], "-m", "Message 5").code == 0

    def test_a_new_head_has_no_base(self, metier, runs):
        done = metier("chat", runs["classify"][0], "-m", "It is late", "--base")
        assert done.code == 2
        assert "no output layer" in done.err


class TestRuns:
    def test_finished_and_unfinished_with_what_to_type(self, place, metier, runs, tmp_path):
        for name, (path, _) in runs.items():
            (tmp_path / name).symlink_to(path)
        started = tmp_path / "started"
        started.mkdir()
        (started / "job.resolved.yaml").write_text((runs["chat"][0] / "job.resolved.yaml").read_text())
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "job.resolved.yaml").write_text("model: [")
        found = {Path(row["run"]).name: row for row in one_json(metier("runs", tmp_path, "--json").out)["runs"]}
        assert {name: row["state"] for name, row in found.items()} == {
            "chat": "finished", "classify": "finished", "complete": "finished", "started": "unfinished", "broken": "unreadable"
        }  # fmt: skip
        assert found["started"]["next"].startswith(f"metier train {started / 'job.resolved.yaml'}")
        assert re.fullmatch(r"Exact match [\d.]+ % -> [\d.]+ %", found["chat"]["result"])
        shown = metier("runs", tmp_path)
        assert shown.code == 0
        assert "started" in shown.out

    def test_none(self, metier, tmp_path):
        assert metier("runs", tmp_path) == Done(0, f"no runs below {tmp_path}\n", "")
        assert one_json(metier("runs", tmp_path, "--json").out) == {"runs": []}


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX only")
class TestSignals:
    def test_a_stopped_training_ends_with_75_and_the_same_command_finishes(self, place):
        whole, cut = (
            recipe(place, name, train={"max_steps": 400, "evaluations": 2, "batch_size": 2})
            for name in ("whole", "cut")
        )
        command = [sys.executable, "-m", "metier", "train"]
        with subprocess.Popen(
            [*command, str(cut)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as running:
            for line in running.stderr:
                if '"event": "step"' in line and json.loads(line)["step"] >= 20:
                    running.send_signal(signal.SIGTERM)
                    break
            told = running.stderr.read()
        assert running.returncode == 75, told
        assert "the same command goes on from here" in told
        folder = place / "runs" / "cut"
        assert not (folder / ".lock").exists()
        assert not (folder / "evidence.json").exists()
        done = subprocess.run([*command, str(cut)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "resumed after step" in done.stderr
        assert subprocess.run([*command, str(whole)], capture_output=True, check=False).returncode == 0
        weights = [
            (place / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
        ]
        assert weights[0] == weights[1]

    def test_a_signal_before_the_first_step_ends_with_75_too(self, place):
        job = recipe(place, "early", evaluate={"retention": "neutral", "rows": None})
        with subprocess.Popen(
            [sys.executable, "-m", "metier", "train", str(job)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as running:
            for line in running.stderr:
                if "measuring the base" in line:
                    time.sleep(0.05)
                    running.send_signal(signal.SIGTERM)
                    break
            told = running.stderr.read()
        assert running.returncode == 75, told
        assert "Traceback" not in told
        assert not (place / "runs" / "early" / ".lock").exists()
