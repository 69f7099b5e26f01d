"""The core room: exit codes, writing that is whole or not at all, independent seeds, and what a phase cost."""

import contextlib
import json
import mmap
import os
import platform
import resource
import subprocess
import sys
import threading
import time

import pytest

from metier import core
from metier.core import DataError, Fault, MetierError, StorageError, files, meter, rng
from metier.core import errors as tree

EXIT_CODES = {
    "MetierError": 1,
    "RecipeError": 2,
    "GateError": 3,
    "DataError": 65,
    "ModelError": 65,
    "DivergedError": 70,
    "BusyError": 73,
    "StorageError": 74,
    "InterruptedRunError": 75,
    "UnsafeError": 77,
}


@contextlib.contextmanager
def small_files():
    """No file may grow beyond 4 KiB, as on a full disk; a block and not a fixture, for the log of the tests grows too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------------------ errors


def test_exit_codes_are_the_ones_that_the_table_prints():
    classes = [kind for kind in vars(tree).values() if isinstance(kind, type) and issubclass(kind, MetierError)]
    assert {kind.__name__: kind.exit_code for kind in classes} == EXIT_CODES
    for name, code in EXIT_CODES.items():
        line = next(line for line in tree.__doc__.splitlines() if f"{name} " in line)
        assert f" {code} " in line, line


def test_every_leaf_hangs_directly_on_the_base():
    for name in set(EXIT_CODES) - {"MetierError"}:
        assert getattr(tree, name).__bases__ == (MetierError,)
        assert name in core.__all__


def test_a_message_says_where_what_and_what_to_do():
    error = DataError("no reply", where="a.jsonl:3", hint="give it one")
    assert str(error) == "a.jsonl:3: no reply - give it one"
    assert error.faults == (Fault("a.jsonl:3", "no reply", "give it one"),)
    assert str(Fault("a", "b", "")) == "a: b"


def test_several_faults_travel_in_one_error_in_order():
    faults = [Fault(f"a.jsonl:{line}", "no reply", "give it one") for line in (9, 2, 5)]
    error = DataError.of(iter(faults))
    assert type(error) is DataError
    assert error.faults == tuple(faults)
    assert str(error).splitlines() == [str(fault) for fault in faults]


# ------------------------------------------------------------------------------------------------ files


def test_text_is_written_as_it_is_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "card.md"
    files.write_text(path, "用途\r\n🙂")
    assert path.read_bytes() == "用途\r\n🙂".encode()
    assert [file.name for file in path.parent.iterdir()] == ["card.md"]
    assert path.stat().st_mode & 0o777 == 0o644
    files.write_text(path, "second")
    assert path.read_text("utf-8") == "second"


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "card.md"
    files.write_text(path, "old")
    with small_files(), pytest.raises(StorageError, match=r"card\.md: cannot write") as caught:
        files.write_text(path, "x" * 100_000)
    assert caught.value.exit_code == 74
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["card.md"]


def test_text_that_is_no_text_leaves_the_old_content(tmp_path):
    path = tmp_path / "card.md"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["card.md"]


def test_a_folder_in_the_way_is_refused(tmp_path):
    (tmp_path / "card.md" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError):
        files.write_text(tmp_path / "card.md", "text")
    assert (tmp_path / "card.md" / "inside").is_dir()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "state.json"
    whole = [json.dumps({"text": letter * 50_000}, indent=2) + "\n" for letter in "ab"]
    files.write_text(path, whole[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for letter in "ba":
                files.write_json(path, {"text": letter * 50_000})

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_text() for _ in range(300)}
    stop.set()
    writer.join()
    assert seen <= set(whole)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_without_a_meaning_is_refused_before_anything_is_written(tmp_path, number):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": number})
    assert not list(tmp_path.iterdir())


def test_digests_and_sizes(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"x" * ((1 << 20) + 1))
    # FIPS 180-2, appendix B.1.
    assert files.sha256(tmp_path / "below" / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert files.size_bytes(tmp_path / "b") == (1 << 20) + 1
    assert files.size_bytes(tmp_path) == (1 << 20) + 4


def test_the_cache_goes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path))
    assert files.cache_root() == tmp_path
    monkeypatch.delenv("METIER_CACHE")
    assert files.cache_root().name == "metier"


# ------------------------------------------------------------------------------------------------ chance


def test_derived_seeds_never_change():
    # A resumed run and a published figure both hang on these values.
    assert rng.derive(0, "train") == 2225127660497744019
    assert rng.derive(7, "order", 2) == 3759329177332215235


def test_derived_seeds_are_apart_and_fit_63_bits():
    seeds = {rng.derive(seed, word, n) for seed in range(20) for word in ("order", "cut") for n in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_one_seed_rules_every_source_of_chance():
    import random

    import numpy as np
    import torch

    def draw():
        rng.seed_everything(rng.derive(3, "train"))
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    assert draw() == draw()
    first = draw()
    rng.seed_everything(4)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) != first  # noqa: NPY002


# ------------------------------------------------------------------------------------------------ cost


def test_a_phase_measures_wall_time_cpu_time_and_memory():
    found = meter.Meter()
    with found.phase("sleep"):
        time.sleep(0.05)
    with found.phase("work"):
        block = bytearray(os.urandom(1 << 20)) * 64
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    sleep, work = found.phases
    assert (sleep.name, work.name) == ("sleep", "work")
    assert sleep.wall_seconds >= 0.05
    assert sleep.cpu_seconds < 0.04
    assert work.cpu_seconds >= 0.05
    assert work.peak_memory_bytes >= len(block)


def test_a_phase_that_fails_is_measured_too():
    found = meter.Meter()
    with pytest.raises(KeyError), found.phase("broken"):
        raise KeyError
    assert [phase.name for phase in found.phases] == ["broken"]


@pytest.mark.skipif(not meter._CLEAR_REFS.exists(), reason="only Linux forgets a peak")
def test_a_peak_belongs_to_its_own_phase():
    found = meter.Meter()
    # A map of its own: what malloc hands out may have been resident before.
    with found.phase("large"), mmap.mmap(-1, 200 << 20) as block:
        for _ in range(200):
            block.write(b"x" * (1 << 20))
    with found.phase("small"):
        pass
    large, small = (phase.peak_memory_bytes for phase in found.phases)
    assert large - small > 100 << 20


# ------------------------------------------------------------------------------------------------ heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library gives memory back at once")
def test_freed_memory_is_used_again_inside_the_block_and_given_back_after_it():
    """In a process of its own: what other tests have left in the heap would be used instead."""
    script = """
import ctypes, resource
from metier.core import heap

memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        place = memory.malloc(ctypes.c_size_t(256 << 20))
        ctypes.memset(ctypes.c_void_p(place), 1, 256 << 20)
        memory.free(ctypes.c_void_p(place))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with heap.kept():
    faults()
    inside = faults()
print(outside, inside, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    outside, inside, after = map(int, done.stdout.split())
    assert inside < outside / 10
    assert after > inside * 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library's heap can be trimmed")
def test_what_was_let_go_before_a_phase_is_not_counted_in_it():
    """In a process of its own; what is freed lies below what stays, so that the heap cannot shrink by itself."""
    script = """
import ctypes
from metier.core import heap
from metier.core.meter import Meter, peak_memory_bytes

memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p
size = 256 << 20
with heap.kept():
    gone, stays = (memory.malloc(ctypes.c_size_t(size)) for _ in range(2))
    for place in (gone, stays):
        ctypes.memset(ctypes.c_void_p(place), 1, size)
memory.free(ctypes.c_void_p(gone))
before, meter = peak_memory_bytes(), Meter()
with meter.phase("later"):
    pass
print(before - meter.phases[0].peak_memory_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 200 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library's heap can be trimmed")
def test_what_the_heap_keeps_for_the_next_step_is_not_given_back_by_a_phase():
    """Steps that are measured one by one, as a probe does, would each pay for their memory anew."""
    script = """
import ctypes, resource
from metier.core import heap
from metier.core.meter import Meter

memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p
faults = []
with heap.kept():
    for _ in range(2):
        with Meter().phase("step"):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            place = memory.malloc(ctypes.c_size_t(256 << 20))
            ctypes.memset(ctypes.c_void_p(place), 1, 256 << 20)
            memory.free(ctypes.c_void_p(place))
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 10


def begun(script: str, **environment: str) -> list[str]:
    """What a script prints, run in a process that begins with these settings of the C library."""
    said = {**{name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}, **environment}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=said)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library has these settings")
class TestDense:
    anew = "import os; from metier.core import heap; print(os.getpid()); heap.begin_dense(); print(heap.is_dense())"
    """Prints its number once for each time that it begins."""
    dense = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"

    def test_a_process_begins_anew_once_and_stays_the_same_process(self):
        first, second, is_dense = begun(self.anew.replace("getpid())", "getpid(), flush=True)"))
        assert first == second
        assert is_dense == "True"

    def test_a_process_that_has_the_settings_goes_on(self):
        assert begun(self.anew, GLIBC_TUNABLES=self.dense)[1:] == ["True"]

    def test_what_a_user_has_set_stays(self):
        script = self.anew.replace("heap.is_dense()", "heap.is_dense(), os.environ['GLIBC_TUNABLES']")
        own = "glibc.malloc.tcache_count=3"
        assert begun(script, GLIBC_TUNABLES=own)[1:] == ["False", own]
        other = "glibc.malloc.arena_max=2"
        assert begun(script, GLIBC_TUNABLES=other)[-2:] == ["True", f"{other}:{self.dense}"]

    def test_the_place_of_a_tensor_holds_the_next_one_of_its_size(self):
        script = """
import torch
from metier.core import heap
from metier.core.meter import peak_memory_bytes

with heap.kept():
    held = [torch.ones(500_000) for _ in range(100)]
    before = peak_memory_bytes()
    held[::2] = [None] * 50
    again = [torch.ones(500_000) for _ in range(50)]
    print(peak_memory_bytes() - before)
"""
        assert int(begun(script, GLIBC_TUNABLES=self.dense)[0]) < 30 << 20  # of 95, and 60 without the settings

    def test_the_command_has_such_a_heap(self):
        script = """
import sys, metier.cli
from metier.core import heap
metier.cli.main = lambda: print(heap.is_dense())
from metier.__main__ import begin
begin()
"""
        assert begun(script) == ["True"]
