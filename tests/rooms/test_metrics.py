"""What counts as a good answer, and the sandbox that runs unit tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from metier.core import RecipeError
from metier.evaluation import check_schema
from metier.evaluation.metrics import METRICS, Answered, exact_match, parse_json
from metier.evaluation.sandbox import Limits, passes, program
from metier.recipe import EvaluateSection

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
PLAIN = EvaluateSection()
LIMITS = Limits(seconds=1.0, megabytes=256)


def may_leave_the_network() -> bool:
    """Whether this machine lets anybody have a network namespace of their own."""
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x50000000))"
    return sys.platform == "linux" and subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def matches(answer: str, reference: str, section: EvaluateSection = PLAIN) -> bool:
    return exact_match(Answered("", answer, reference, {}), section) == 1.0


def value(name: str, answer: str, reference: str = "", section: EvaluateSection = PLAIN, question: str = "", **extras):
    return METRICS[name].row(Answered(question, answer, reference, extras), section)


class TestExactMatch:
    def test_json_in_any_order_and_spacing(self):
        assert matches('{"b": [1, 2],\n "a": null}', '{"a":null,"b":[1,2]}')

    @pytest.mark.parametrize(
        ("answer", "reference"),
        [
            ('Sure: {"a": 1}', '{"a": 1}'),
            ('{"a": 1} ok?', '{"a": 1}'),
            ('```json\n{"a": 1}\n```', '{"a": 1}'),
            ('{"a": 1, "b": 2}', '{"a": 1}'),
            ("[2, 1]", "[1, 2]"),
            ("[1]", "[1, 1]"),
            ('{"a": true}', '{"a": 1}'),
            ('{"a": [false]}', '{"a": [0]}'),
            ('{"a": "1"}', '{"a": 1}'),
            ("", '{"a": 1}'),
        ],
    )
    def test_what_is_not_the_same_json(self, answer, reference):
        assert not matches(answer, reference)

    def test_numbers_are_equal_by_value(self):
        assert matches('{"a": 1.0}', '{"a": 1}')

    def test_text_with_spaces_evened_out_but_not_letters(self):
        assert matches(" The  cat\n sat ", "The cat sat")
        assert not matches("the cat sat", "The cat sat")
        assert not matches("1.0", "1")

    def test_deep_json_is_compared_without_a_crash(self):
        deep = "[" * 400 + "]" * 400
        assert matches(deep, deep)
        assert not matches("[" * 100_000, '{"a": 1}')

    @pytest.mark.parametrize(
        "answer", ["#### 1234", "so\n#### 1,234", "#### $1,234.", "a #### 3\n#### 1234\nsaid I", "####1234"]
    )
    def test_final_answers_that_agree(self, answer):
        assert matches(answer, "40 * 30 + 34\n#### 1,234", EvaluateSection(answer_after="####"))

    @pytest.mark.parametrize("answer", ["1234", "#### 123", "#### 1234 or 5", "####", "#### -1234", ""])
    def test_final_answers_that_do_not(self, answer):
        assert not matches(answer, "#### 1,234", EvaluateSection(answer_after="####"))
        assert not matches("no end", "no end either", EvaluateSection(answer_after="####"))

    def test_final_answers_of_words(self):
        section = EvaluateSection(answer_after="Answer:")
        assert matches("thinking. Answer:  (b)  yes", "Answer: (b) yes", section)


class TestJson:
    @pytest.mark.parametrize("answer", ['{"a": 1}', " [] ", "3", '"x"', "null", "true", '{"a": {"b": [1.5e3]}}'])
    def test_valid(self, answer):
        assert value("valid_json", answer) == 1

    @pytest.mark.parametrize(
        "answer",
        ["", "{", "NaN", '{"a": NaN}', "[Infinity]", "-Infinity", "{'a': 1}", '{"a": 1,}', '{"a": 1} {"b": 2}'],
    )
    def test_invalid(self, answer):
        assert value("valid_json", answer) == 0

    def test_nesting_and_numbers_without_end(self):
        for text in ("[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000, "1" * 100_000):
            assert value("valid_json", text) == 0

    def test_applies_where_the_references_are_json(self):
        applies = METRICS["valid_json"].applies
        assert applies([Answered("", "x", '{"a": 1}', {})], PLAIN)
        assert not applies([Answered("", "x", '{"a": 1}', {}), Answered("", "x", "five", {})], PLAIN)
        assert not applies([Answered("", "x", "5", {})], PLAIN)


class TestSchema:
    @pytest.fixture
    def section(self, tmp_path):
        schema = {"type": "object", "required": ["team"], "properties": {"team": {"enum": ["a", "b"]}}}
        path = tmp_path / "reply.schema.json"
        path.write_text(json.dumps(schema))
        return EvaluateSection(json_schema=str(path))

    @pytest.mark.parametrize(
        ("answer", "right"),
        [('{"team": "a"}', 1), ('{"team": "c"}', 0), ("{}", 0), ("[]", 0), ('say {"team": "a"}', 0)],
    )
    def test_answers(self, section, answer, right):
        assert value("valid_schema", answer, section=section) == right

    def test_applies_only_with_a_schema(self, section):
        assert METRICS["valid_schema"].applies([], section)
        assert not METRICS["valid_schema"].applies([], PLAIN)

    @pytest.mark.parametrize("text", ["", "{", '{"type": "objekt"}', "[]", '{"required": "team"}'])
    def test_what_is_no_schema_is_refused_with_its_file(self, tmp_path, text):
        path = tmp_path / "bad.schema.json"
        path.write_text(text)
        with pytest.raises(RecipeError, match="not a JSON Schema") as caught:
            check_schema(EvaluateSection(json_schema=str(path)))
        assert caught.value.faults[0].where == str(path)

    def test_a_missing_file_and_none_at_all(self, tmp_path):
        with pytest.raises(RecipeError, match="No such file"):
            check_schema(EvaluateSection(json_schema=str(tmp_path / "none.json")))
        check_schema(PLAIN)


class TestSimilarityAndAccuracy:
    def test_edit_similarity(self):
        assert value("edit_similarity", "abc", " abc ") == 1
        assert value("edit_similarity", "abc", "xyz") == 0
        assert value("edit_similarity", "abcd", "bcde") == 0.75

    def test_accuracy(self):
        assert value("accuracy", "a", "a") == 1
        assert value("accuracy", "a", "A") == 0


HUMANEVAL = {
    "question": 'from typing import List\n\n\ndef add(numbers: List[int]) -> int:\n    """ Add them.\n    >>> add([1])\n    1\n    """\n',
    "extras": {"test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n", "entry_point": "add"},
}


def passes_humaneval(answer: str) -> bool:
    return passes(HUMANEVAL["question"], answer, HUMANEVAL["extras"], LIMITS)


def passes_mbpp(answer: str, *tests: str) -> bool:
    return passes(
        "Write a function to add two numbers:", answer, {"tests": list(tests or ["assert add(1, 2) == 3"])}, LIMITS
    )


class TestUnitTests:
    @pytest.mark.parametrize(
        "answer",
        [
            "    return sum(numbers)\n",
            "def add(numbers: List[int]) -> int:\n    return sum(numbers)\n",
            "Here it is:\n```python\ndef add(numbers: List[int]) -> int:\n    return sum(numbers)\n```\nDone.",
            "    import math\n    return math.floor(sum(numbers))\n",
            "import math\ndef add(numbers):\n    return math.floor(sum(numbers))\n",
        ],
    )
    def test_humaneval_form(self, answer):
        assert passes_humaneval(answer)

    @pytest.mark.parametrize("answer", ["    return 0\n", "    return sum(number)\n", "  return (", "", "\ud83d", "\0"])
    def test_humaneval_form_fails(self, answer):
        assert not passes_humaneval(answer)

    @pytest.mark.parametrize(
        "answer",
        [
            "def add(a, b):\n    return a + b",
            "```\ndef add(a, b):\n    return a + b\n```",
            "```py\ndef add(a, b):\n    return a + b",
            "To add:\n\n```python\nadd = lambda a, b: a + b\n```\n",
            "import operator\nadd = operator.add",
        ],
    )
    def test_mbpp_form(self, answer):
        assert passes_mbpp(answer)

    def test_every_test_must_pass(self):
        assert not passes_mbpp("def add(a, b):\n    return 3", "assert add(1, 2) == 3", "assert add(1, 1) == 2")

    def test_tests_as_one_text(self):
        extras = {"tests": "assert add(1, 2) == 3\nassert add(0, 0) == 0"}
        assert passes("Add.", "def add(a, b):\n    return a + b", extras, LIMITS)

    @pytest.mark.parametrize("extras", [{}, {"tests": []}, {"test": ""}, {"test": None}])
    def test_no_tests_do_not_pass(self, extras):
        assert not passes("Add.", "def add(a, b):\n    return a + b", extras, LIMITS)

    @pytest.mark.parametrize(
        "leaving", ["import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)", "if True:\n    quit()"]
    )
    def test_leaving_before_the_tests_does_not_pass(self, leaving):
        assert not passes_mbpp(f"{leaving}\n")

    def test_endless_loop_is_stopped(self):
        assert not passes_mbpp("while True:\n    pass")

    def test_sleep_is_stopped(self):
        assert passes_mbpp("import time\ntime.sleep(0.01)\nadd = lambda a, b: a + b")
        assert not passes_mbpp("import time\ntime.sleep(60)\nadd = lambda a, b: a + b")  # would pass if it woke up

    @pytest.mark.skipif(os.name != "posix", reason="memory limits are POSIX only")
    def test_memory_bomb_is_stopped(self):
        assert not passes_mbpp("add = lambda a, b: a + b\nx = bytearray(2 ** 30)")
        assert passes_mbpp("add = lambda a, b: a + b\nx = bytearray(2 ** 20)")

    @pytest.mark.skipif(os.name != "posix", reason="file limits are POSIX only")
    def test_file_bomb_is_stopped(self):
        assert not passes_mbpp("add = lambda a, b: a + b\nwith open('big', 'wb') as f:\n    f.write(b'x' * (1 << 22))")
        assert passes_mbpp("add = lambda a, b: a + b\nwith open('small', 'wb') as f:\n    f.write(b'x' * 100)")

    def test_output_flood_goes_nowhere(self, capfd):
        assert passes_mbpp("add = lambda a, b: a + b\nfor _ in range(20_000):\n    print('x' * 100)")
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        "start",
        [
            "import os\nos.fork()",
            "import os\nos.system('true')",
            "import os\nos.execv('/bin/true', ['true'])",
            "import os\nos.posix_spawn('/bin/true', ['true'], {})",
            "import subprocess\nsubprocess.run(['/bin/true'])",
            "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
            "import os, signal\nos.kill(os.getppid(), 0)",
            "import ctypes\nctypes.CDLL(None).system(b'true')",
        ],
    )
    def test_it_starts_no_process_and_no_native_code(self, start):
        assert not passes_mbpp(f"{start}\nadd = lambda a, b: a + b")

    def test_threads_and_the_standard_library_are_free(self):
        use = "import asyncio, threading, tempfile, json, re, random, uuid, datetime\nt = threading.Thread(target=int)\nt.start()\nt.join()\n"
        use += "with tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w').write('x')\n"
        assert passes_mbpp(f"{use}add = lambda a, b: a + b")

    @pytest.mark.parametrize(
        "change",
        [
            "open({path!r}, 'w')",
            "open({path!r}, 'a')",
            "open({path!r}, 'r+')",
            "import os\nos.remove({path!r})",
            "import os\nos.rename({path!r}, 'here')",
            "import os\nos.link({path!r}, 'here')",
            "import os\nos.truncate({path!r}, 0)",
            "import os\nos.chmod({path!r}, 0)",
            "import os\nos.open({path!r}, os.O_WRONLY)",
            "import os\nos.symlink({path!r}, 'here')\nopen('here', 'w')",
            "import os\nos.chdir(os.path.dirname({path!r}))\nopen('mine', 'w')",
            "import shutil\nshutil.rmtree({folder!r})",
            "import pathlib\npathlib.Path({path!r}).write_text('x')",
            "import os\nos.open('mine', os.O_WRONLY, dir_fd=os.open({folder!r}, os.O_RDONLY))",
            "import os\nos.unlink('mine', dir_fd=os.open({folder!r}, os.O_RDONLY))",
            "import os\nos.makedirs('a/b')\nos.chdir('a/b')\nopen('../../../' + os.path.basename({folder!r}), 'w')",
        ],
    )
    def test_files_outside_its_folder_stay_as_they_are(self, tmp_path, change):
        path = tmp_path / "mine"
        path.write_text("mine")
        assert not passes_mbpp(f"{change.format(path=str(path), folder=str(tmp_path))}\nadd = lambda a, b: a + b")
        assert path.read_text() == "mine"

    @pytest.mark.parametrize(
        "reach",
        [
            "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
            "import socket\nsocket.socket(socket.AF_UNIX).connect('/tmp/x')",
            "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
            "import _socket\n_socket.socket().connect(('127.0.0.1', {port}))",
        ],
    )
    def test_the_network_is_out_of_reach(self, reach):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.2)
            assert not passes_mbpp(f"{reach.format(port=server.getsockname()[1])}\nadd = lambda a, b: a + b")
            with pytest.raises(TimeoutError):
                server.accept()

    @pytest.mark.skipif(not may_leave_the_network(), reason="user namespaces are not allowed here")
    def test_where_the_kernel_allows_it_there_is_no_network_at_all(self):
        answer = "names = [line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]]\nassert 'lo' in names and not any(name.startswith(('e', 'w', 'v', 'd')) for name in names), names\nadd = lambda a, b: a + b"
        assert passes_mbpp(answer)

    def test_it_sees_neither_environment_nor_standard_input(self, monkeypatch):
        monkeypatch.setenv("SECRET_WORD", "x")
        answer = "import os, sys\nassert 'SECRET_WORD' not in os.environ\nassert sys.stdin.read() == ''\nadd = lambda a, b: a + b"
        assert passes_mbpp(answer)

    def test_run_only_when_the_recipe_says_so(self):
        rows = [Answered("", "x", "", {"tests": ["assert True"]})]
        applies = METRICS["tests_passed"].applies
        assert applies(rows, EvaluateSection(run_tests=True))
        assert not applies(rows, EvaluateSection(run_tests=False))
        assert not applies([Answered("", "x", "", {})], EvaluateSection(run_tests=True))

    def test_metric_takes_the_limits_of_the_recipe(self):
        section = EvaluateSection(run_tests=True, test_seconds=1, test_megabytes=128)
        good = "def add(a, b):\n    return a + b"
        assert value("tests_passed", good, section=section, tests=["assert add(1, 2) == 3"]) == 1
        assert (
            value("tests_passed", f"{good}\nx = bytearray(1 << 28)", section=section, tests=["assert add(1, 2) == 3"])
            == 0
        )

    @pytest.mark.parametrize("name", ["humaneval", "mbpp"])
    def test_published_solutions_pass(self, name):
        path = SHARED / name / "test.jsonl"
        if not path.is_file():
            pytest.skip(f"{path} is absent")
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:25]]
        failed = [
            row["prompt"]
            for row in rows
            if not passes(row["prompt"], row["completion"], row, Limits(seconds=5, megabytes=512))
        ]
        assert not failed


def test_parse_json_tells_null_from_nothing():
    assert parse_json("null") is None
    assert parse_json("nil") is not None


def test_program_keeps_a_function_prompt_before_its_continuation():
    assert program("def f():\n", "    return 1", {"tests": ["assert f()"]}).startswith("def f():\n    return 1\n")
