"""Disks that fail, fill up, or lose what was not synced: nothing acknowledged is lost, and the run can go on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import small
from faults import Failing, Recording, Simulated, write_tree

from metier.core import StorageError, files
from metier.training import checkpoint

NUMBERS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The training that nothing disturbs: its bits, its log, and its file operations."""
    folder = tmp_path_factory.mktemp("wanted")
    recording = Recording()
    with disk(recording):
        module, _ = small.train(folder)
    return small.bits(module), small.log(folder), recording.done, folder


@contextmanager
def disk(other: files.Disk):
    """Another disk in the place of the system's."""
    before, files.disk = files.disk, other
    try:
        yield other
    finally:
        files.disk = before


def is_as_wanted(folder: Path, wanted) -> None:
    """The same command ends with the same bits and the same log."""
    module, outcome = small.train(folder)
    assert outcome.steps == small.STEPS
    assert small.bits(module) == wanted[0]
    assert small.log(folder) == wanted[1]
    assert small.debris(folder) == []


@pytest.mark.parametrize("name", NUMBERS)
def test_a_fault_at_every_operation_leaves_what_was_saved(tmp_path, wanted, counts, whole, name):
    total = len(wanted[2])
    assert total > 100
    for n in range(1, total + 1, 1 if whole else 11):
        folder = tmp_path / str(n)
        counts["faults"] += 1
        saved: list[int] = []
        with disk(Failing(n, NUMBERS[name])) as failing, pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "commit", _acknowledged(saved))
            error = _error_of(folder)
        # What is only tidied up is said and passed over; everything else ends the run.
        assert error is not None or failing.hit.startswith(("remove", "rename step-", "rename best-")), failing.hit
        if error is not None:
            assert error.exit_code == 74
            assert os.strerror(NUMBERS[name]) in str(error), failing.hit
        assert failing.hit
        assert not [path for path in small.debris(folder) if path.startswith(files.STAGED)], failing.hit
        assert small.newest(folder) >= max(saved, default=0), failing.hit
        is_as_wanted(folder, wanted)
        shutil.rmtree(folder)
        counts["faults: held"] += 1


def _error_of(folder: Path) -> StorageError | None:
    try:
        small.train(folder)
    except StorageError as error:
        return error
    return None


def _acknowledged(saved: list[int]):
    commit = checkpoint.commit

    def watched(folder, progress, contents, *, keep):
        commit(folder, progress, contents, keep=keep)
        saved.append(progress.step)

    return watched


def test_a_power_cut_after_every_operation_loses_nothing_acknowledged(tmp_path, wanted, counts, whole):
    """What was not synced is gone; names that were not synced are gone in one half of the cases, kept in the other."""
    *_, operations, root = wanted
    simulated = Simulated(root)
    acknowledged = 0
    for n, operation in enumerate(operations):
        simulated.do(operation)
        # A checkpoint is acknowledged once the folder above has been synced behind its rename.
        if operation.kind == "sync_folder" and operation.path.name == "checkpoints":
            there = [path.name for path in simulated.seen if path.name.startswith("step-")]
            acknowledged = max([acknowledged, *(int(name[5:13]) for name in there)])
        if not whole and n % 7:
            continue
        for names in ("kept", "seen"):
            counts["prefixes"] += 1
            place = tmp_path / f"{n}-{names}"
            place.mkdir()
            write_tree(simulated.left(names=names), root, place)
            found = small.newest(place)
            assert found >= acknowledged, f"after {operation.kind} {operation.path.relative_to(root)}, names {names}"
            if n % 14 == 0 or (whole and n % 3 == 0):
                is_as_wanted(place, wanted)
            shutil.rmtree(place)
            counts["prefixes: held"] += 1
    assert acknowledged == small.STEPS


def test_every_operation_of_a_training_is_recorded(wanted):
    """Nothing that stands in the folder came there by another way than the file layer."""
    *_, operations, root = wanted
    simulated = Simulated(root)
    for operation in operations:
        simulated.do(operation)
    there = {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    assert {
        path: None if file is None else file.seen for path, file in simulated.seen.items() if root in path.parents
    } == there


# ------------------------------------------------------------------------------------------------ the real kernel


@contextmanager
def small_disk(place: Path, size: int):
    """A file system of so many bytes, or a test that is passed over where nobody may make one."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("percent", [3, 10, 20, 30, 40, 50, 60, 70, 80, 90])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_disk_that_fills_up(tmp_path, wanted, counts, whole, monkeypatch, percent, step):
    """Somebody else fills the disk after a step; there is room for a part of the next checkpoint."""
    if not whole and (step != 3 or percent not in {10, 60}):
        pytest.skip("in make crash")
    newest = max((wanted[3] / "checkpoints").glob("step-*"))
    one = sum(path.stat().st_size for path in newest.iterdir())
    counts["full"] += 1
    with small_disk(tmp_path / "disk", 1 << 20):
        folder, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
        commit = checkpoint.commit

        def fill(place, progress, contents, *, keep):
            commit(place, progress, contents, keep=keep)
            if progress.step == step:
                free = shutil.disk_usage(place).free
                ballast.write_bytes(b"x" * max(0, free - one * percent // 100))

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "commit", fill)
            error = _error_of(folder)
        assert error is not None
        assert error.exit_code == 74
        assert "No space left on device" in str(error)
        assert small.debris(folder) == []
        assert small.newest(folder) >= step
        ballast.unlink()
        is_as_wanted(folder, wanted)
    counts["full: held"] += 1


@pytest.mark.parametrize(
    "limit", [16, 200, 400, 600, 800, 1000, 1500, 2000, 5000, 10_000, 15_000, 19_000, 22_000, 25_000, 30_000]
)
@pytest.mark.parametrize("step", [1, 4])
def test_a_limit_on_the_size_of_files(tmp_path, wanted, counts, whole, monkeypatch, limit, step):
    """The kernel cuts a write off in the middle."""
    if not whole and (step != 4 or limit not in {200, 10_000}):
        pytest.skip("in make crash")
    counts["full"] += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    commit = checkpoint.commit

    def limited(place, progress, contents, *, keep):
        commit(place, progress, contents, keep=keep)
        if progress.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "commit", limited)
            error = _error_of(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    largest = max(len(one.content) for one in wanted[2])
    assert error is not None or limit > largest
    assert error is None or error.exit_code == 74
    assert small.debris(tmp_path) == []
    assert small.newest(tmp_path) >= step
    is_as_wanted(tmp_path, wanted)
    counts["full: held"] += 1


@pytest.mark.parametrize("short", [1, 1000, 10**6])
def test_too_little_space_is_refused_before_the_first_step(tmp_path, counts, monkeypatch, short):
    counts["preflight"] += 1
    module = small.fresh()
    needed = 3 * checkpoint.estimated_bytes(module) + 2 * checkpoint.weights_bytes(module)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=max(0, needed - short)))
        with pytest.raises(StorageError, match="more than is free"):
            small.train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert small.debris(tmp_path) == []
    counts["preflight: held"] += 1
