"""Disks that are full, folders that are read-only or deleted while a run writes to them: what it
says, what remains, and how it goes on. The errors are real ones."""

import contextlib
import functools
import shutil
import subprocess

import pytest
from conftest import assert_same, assert_same_end
from faults import at_step, limit_files
from processes import SMALL, checkpoints, run_ranks, start_ranks, state, survey


@pytest.fixture(scope="module")
def whole(tmp_path_factory, words):
    """An undisturbed run of SMALL."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_ranks(words(out, **SMALL), 1)
    return out


@pytest.mark.parametrize("world, step, interval, log, said", [
    (1, 1, 1, False, "ckpt.pt"), (2, 1, 1, False, "ckpt.pt"), (1, 65, 20, True, "intact")])
def test_a_file_that_cannot_grow(words, tmp_path, world, step, interval, log, said):
    """In the middle of the second checkpoint, which rank 0 writes, or of the log; two processes are
    sharded."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SMALL, "parallel": "ddp" if world == 1 else "fsdp", "max_iters": step + 2,
               "save_interval": interval, "eval_interval": 3 * interval}
    run_ranks(words(whole, **options), world)
    limit = functools.partial(limit_files, 40_000, str(out / "log.jsonl") if log else "")
    for program in start_ranks(words(out, **options), world, functools.partial(
            at_step, step, limit)):
        program.refused(str(out), said, "File too large", "intact")
    assert survey(out, interval) == step // interval * interval
    assert not list(out.glob("*.partial"))
    run_ranks(words(out, **options), world)
    assert_same_end(out, whole)


@contextlib.contextmanager
def mounted(folder, size):
    """A file system of its own; what it yields mounts it again with other options."""
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                              capture_output=True).returncode

    if shutil.which("mount") is None or mount(f"size={size}"):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_or_read_only(words, tmp_path, whole):
    """It holds one checkpoint, not two; then it is made larger, and becomes read-only."""
    size = (whole / "ckpt.pt").stat().st_size
    with mounted(tmp_path / "disk", int(1.6 * size)) as remount:
        out = tmp_path / "disk" / "out"
        for _ in range(2):
            (program,) = start_ranks(words(out, **SMALL), 1)
            program.refused(str(out), "ckpt.pt")
            assert survey(out) == 1 and not list(out.glob("*.partial"))
        assert remount(f"size={20 * size}") == 0
        run_ranks(words(out, **SMALL), 1)
        assert_same_end(out, whole)
        before = checkpoints(out)
        assert remount("ro") == 0
        (program,) = start_ranks(words(out, **SMALL | {"max_iters": 8}), 1)
        program.refused(str(out), "Read-only file system")
        assert checkpoints(out) == before and remount("rw") == 0
        run_ranks(words(out, **SMALL | {"max_iters": 8}), 1)
        assert survey(out) == 8


@pytest.mark.parametrize("world, parallel", [
    (1, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.torture)])
def test_a_folder_deleted_meanwhile(words, tmp_path, world, parallel):
    """The next save makes it anew, and then the run ends, because its log is lost."""
    options = {**SMALL, "parallel": parallel}
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_ranks(words(whole, **options), world)
    for program in start_ranks(words(out, **options), world, functools.partial(
            at_step, 3, functools.partial(shutil.rmtree, out))):
        program.refused(str(out), "deleted", "step 4", "--init_from=resume")
    assert state(out)["iter_num"] == 4 and not list(out.glob("*.partial"))
    run_ranks(words(out, **options), world)
    assert_same(state(out), state(whole))


def test_data_deleted_meanwhile(words, tmp_path, data_dir, whole):
    """A run that has it open goes on; the next one says what is missing."""
    shutil.copytree(data_dir / "easy", tmp_path / "data/easy")
    options = {**SMALL, "data_dir": tmp_path / "data"}
    out = tmp_path / "out"
    run_ranks(words(out, **options), 1, functools.partial(
        at_step, 2, functools.partial(shutil.rmtree, tmp_path / "data/easy")))
    assert_same(state(out), state(whole))
    before = checkpoints(out)
    (program,) = start_ranks(words(out, **options | {"max_iters": 8}), 1)
    program.refused("no data in", str(tmp_path / "data/easy"), "prepare.py")
    assert checkpoints(out) == before
