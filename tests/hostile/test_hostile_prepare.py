"""prepare.py, killed at any moment, on disks that refuse, without a network: what remains is the
old data, or none, or the new; and the same command makes it whole.

The long series are for `make torture`.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from faults import WRITE, kill_at, limit_files, small_blocks
from processes import ROOT, Program, until

import prepare
from support.errors import UserError
from support.meta import load_meta

torture = pytest.mark.torture


@pytest.fixture
def command(tmp_path):
    """command(name, *words): prepares the same two hundred stories as tmp_path/data/name."""
    rng = random.Random(0)
    stories = ("".join(rng.choices("abc d\n", k=rng.randint(20, 200))) for _ in range(200))
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(f"x{s}\n" for s in stories))

    def words(name, *more) -> list[str]:
        return ["text", "--tokenizer=bytes", f"--input={tmp_path / 'stories.txt'}", "--num_proc=1",
                f"--data_dir={tmp_path / 'data'}", f"--name={name}", *more]

    return words


def start(argv, then=None) -> Program:
    return Program(argv, "prepare", functools.partial(small_blocks, then))


def finish(argv, then=None) -> str:
    """Run to a good end; what it printed."""
    program = start(argv, then)
    assert program.wait() == 0, program.output
    return program.output


def kill_inside(fatal: int) -> functools.partial:
    """A hook that kills prepare.py at this moment of its work on files; 0: it counts them."""
    return functools.partial(kill_at, fatal, "prepare", WRITE)


def contents(folder: Path) -> dict[str, bytes]:
    """Its files, when it is done: nothing else is left in it."""
    assert not (folder / "partial").exists(), os.listdir(folder / "partial")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def accepted(folder: Path) -> dict[str, bytes] | None:
    """The folder's files, if train.py would take them."""
    try:
        load_meta(folder)
    except UserError:
        return None
    return {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}


# -----------------------------------------------------------------------------
# kill -9


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=torture)])
def test_kill_9(tmp_path, command, every, overwrite):
    """At the moments of a run, most of them at its end, when the data move into place: it leaves
    the old data, or none, or the new, never a mixture; the same command makes it whole."""
    data, seen = tmp_path / "data", []
    finish(command("old", "--seed=1"))
    output = finish(command("new", "--seed=2"), kill_inside(0))
    last = int(output.split("moments so far: ")[-1].split()[0])
    old, new = contents(data / "old"), contents(data / "new")
    assert old["train.bin"] != new["train.bin"]
    assert new.keys() == {"train.bin", "val.bin", "meta.json"}
    states, argv = [None, new], command("killed", "--seed=2")
    if overwrite:
        states.append(old)
        argv.append("--overwrite")
    for fatal in (*range(1, last - 30, every * last // 20), *range(last, last - 30, -every)):
        shutil.rmtree(data / "killed", ignore_errors=True)
        if overwrite:
            shutil.copytree(data / "old", data / "killed")
        program = start(argv, kill_inside(fatal))
        assert program.wait() == -signal.SIGKILL, program.output
        assert accepted(data / "killed") in states, fatal
        seen.append(states.index(accepted(data / "killed")))
        finish(argv)
        assert contents(data / "killed") == new, fatal
    assert 0 in seen and (2 in seen) is overwrite


def proc(path: str) -> str:
    """What the system says of a process; nothing of one that has ended."""
    try:
        return Path("/proc", path).read_text()
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=torture)])
def test_workers_do_not_outlive_their_parent(tmp_path, command, kills):
    """The first kill at once, the others at work. The next run continues."""
    argv = command("killed", "--num_proc=2")  # the later option wins
    stories = tmp_path / "stories.txt"
    stories.write_text(stories.read_text() * 5)
    folder = tmp_path / "data/killed"
    progress, batches = folder / "partial/progress.json", 0

    def at_work() -> bool:
        return progress.exists() and json.loads(progress.read_text())["batches"] > batches

    for kill in range(kills):
        program = start(argv)
        children = f"{program.pid}/task/{program.pid}/children"
        until(lambda children=children: len(proc(children).split()) > 1)
        workers = proc(children).split()
        if kill > 0:
            until(lambda process=program.process: at_work() or not process.is_alive())
        assert program.process.is_alive(), program.output
        program.process.kill()
        program.wait()
        until(lambda pids=workers: all(proc(f"{pid}/cmdline") == "" for pid in pids), 30)
        with pytest.raises(UserError, match="unfinished"):
            load_meta(folder)
        batches = json.loads(progress.read_text())["batches"]
    assert "continuing an interrupted run" in finish(argv)
    finish(command("whole"))
    assert contents(folder) == contents(tmp_path / "data/whole")


def test_a_killed_worker(tmp_path, command, monkeypatch):
    broken = Mock(side_effect=prepare.BrokenProcessPool)
    monkeypatch.setattr(prepare.ProcessPoolExecutor, "submit", broken)
    monkeypatch.setattr(prepare, "WORKER_SHARE", 1)
    with pytest.raises(UserError, match="^a worker process died .* the same command continues"):
        prepare.main(command("data", "--num_proc=2"))


# -----------------------------------------------------------------------------
# Disks, networks and texts that are not as one would wish


def test_a_bin_that_cannot_grow(tmp_path, command):
    """Nor any other file: what was saved before is kept."""
    for limit in 500, 3000, 12_000:
        program = start(command("data"), functools.partial(limit_files, limit))
        program.refused(str(tmp_path / "data"), "File too large; once that is mended, the same "
                        "command continues")
        with pytest.raises(UserError, match="unfinished"):
            load_meta(tmp_path / "data/data")
    finish(command("data"))
    finish(command("whole"))
    assert contents(tmp_path / "data/data") == contents(tmp_path / "data/whole")


@pytest.mark.parametrize("words, message", [
    (["tinystories"], "cannot download the tokenizer gpt2"),
    (["tinystories", "--tokenizer=bytes"], "cannot load roneneldan/TinyStories")])
def test_without_a_network(tmp_path, words, message):
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1",
               "HF_HOME": str(tmp_path / "empty"), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "prepare.py", *words, f"--data_dir={tmp_path / 'data'}"],
                          cwd=ROOT, text=True, capture_output=True, env=os.environ | offline)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "data").exists()


def test_memory_does_not_grow_with_the_text(tmp_path):
    with open(tmp_path / "big.txt", "w") as file:  # one document, no newline
        file.writelines("word " * 200_000 for _ in range(30))
    code = ("import resource, sys, numpy, tqdm, prepare; from support import text\n"
            "text.BLOCK = prepare.BATCH = 1 << 18\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); prepare.main(sys.argv[1:]); print(peak() - before)")
    words = ["text", "--tokenizer=bytes", f"--input={tmp_path / 'big.txt'}", "--num_proc=1",
             f"--data_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, text=True,
                          capture_output=True)
    kib = int(done.stdout.splitlines()[-1])
    assert kib < 15_000, f"{kib} KiB for a text of 30,000"
