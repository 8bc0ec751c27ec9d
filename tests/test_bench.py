"""bench.py: it measures what it says, on models so small that their figures mean nothing."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_data
from test_train import refused

import bench
import train
from config import read_config
from model import GPT, GPTConfig

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--vocab_size=64",
        "--batch_size=2", "--gradient_accumulation_steps=2", "--repeats=3", "--steps=2",
        "--max_new_tokens=20", "--device=cpu", "--dtype=float32",
        "--variants", "template=gd", "template=tmm n_layer=1"]
NANOGPT = """
from dataclasses import dataclass
import model
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float
    bias: bool
class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**vars(config)))
"""


def test_figures_are_of_the_times(monkeypatch):
    """Two variants in turn, of which the second does half the work, in scripted seconds."""
    clock = iter([9.0, 8.0, *(1.0, 2.0, 4.0, 2.0, 2.0, 8.0)])
    ran = []
    monkeypatch.setattr(bench, "seconds", lambda run, _: (run(), next(clock))[1])
    cpu = torch.device("cpu")
    a, b = (bench.Variant(n, lambda n=n: ran.append(n), tokens, 7, 0, 0, cpu)
            for n, tokens in (("a", 100), ("b", 50)))
    first, second = bench.alternate([a, b], 3)
    assert "".join(ran) == "abab" + "ababab"
    assert (first["warm_up_s"], second["warm_up_s"]) == (9.0, 8.0)
    assert (first["low"], first["tokens_per_s"], first["high"]) == (25.0, 50.0, 100.0)
    assert (second["low"], second["tokens_per_s"], second["high"]) == (6.25, 25.0, 25.0)
    assert first["ratio"] == 1.0
    assert second["ratio"] == statistics.median([25 / 100, 25 / 25, 6.25 / 50])


@pytest.mark.parametrize("command", ["speed", "decode", "memory", "data"])
def test_every_command(command, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    argv = [command, *TINY, f"--json={tmp_path}/figures.json"]
    theirs = command == "decode"  # speed would compile
    bench.main([*argv, f"--nanogpt={tmp_path}"] if theirs else argv)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    names = ["template=gd", "template=tmm n_layer=1"] + ["nanogpt"] * theirs
    assert [row["variant"] for row in rows] == names
    assert all(name in printed for name in names) and "torch" in printed
    for row, options in zip(rows, (dict(), dict(template="tmm", n_layer=1)), strict=False):
        model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64,
                                     bias=False) | options))
        assert row.get("parameters", len(list(model.parameters()))) in (
            model.get_num_params(False), len(list(model.parameters())))
        assert all(v > 0 for k, v in row.items() if k not in ("variant", "peak_mb", "ratio"))
    if command == "speed":
        ours = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64))
        assert rows[0]["mflop_per_token"] == pytest.approx(ours.flops_per_token() / 1e6)
        assert 0 < rows[0]["share_of_peak"] < 1


def test_the_step_that_is_measured_trains(tmp_path):
    """The loss of a variant falls on the data that it reads."""
    c, _ = bench.read_config(bench.BenchConfig, ["speed", *TINY, "--vocab_size=2", "--steps=60",
                                                 "--learning_rate=1e-2"], positional="command")
    torch.zeros(200_000, dtype=torch.int16).numpy().tofile(tmp_path / "train.bin")
    losses, real = [], bench.accumulate

    def watched(*arguments):
        losses.append(real(*arguments).item())
        return torch.tensor(losses[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "accumulate", watched)
        bench.training("", c, str(tmp_path)).run()
    assert len(losses) == 60 and losses[-1] < 0.1 * losses[0]


def test_mistakes(tmp_path):
    refused(lambda: bench.main([]), "speed", "decode")
    refused(lambda: bench.main(["sped"]), "command=sped", "speed")
    refused(lambda: bench.main(["decode", *TINY, f"--nanogpt={tmp_path}"]), "model.py")
    refused(lambda: bench.main(["speed", *TINY, "--variants", "n_layr=1"]), "n_layr", "n_layer")
    refused(lambda: bench.main(["prepare", f"--input={tmp_path}/none.txt", "--repeats=1",
                                f"--nanogpt={tmp_path}"]), "none.txt", "No such file")
    write_data(tmp_path / "shakespeare_char", range(65), vocab_size=65)
    refused(lambda: bench.main(["loss", f"--data_dir={tmp_path}", f"--nanogpt={tmp_path}/none"]),
            "none", "No such file")


def test_decoding_over_lengths(tmp_path, capsys):
    """Decoding with a plot: every length, both code bases, in one table and one picture."""
    (tmp_path / "model.py").write_text(NANOGPT)
    bench.main(["decode", *TINY, f"--nanogpt={tmp_path}", f"--json={tmp_path}/figures.json",
                f"--plot={tmp_path}/figures.png"])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["new_tokens"] for row in rows] == [5] * 3 + [10] * 3 + [20] * 3
    assert (tmp_path / "figures.png").read_bytes()[:4] == b"\x89PNG"


def test_muon(tmp_path, capsys):
    bench.main(["muon", *TINY, f"--json={tmp_path}/figures.json", f"--plot={tmp_path}/figures.png"])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    for row in rows:
        assert 0 < row["muon_share"] < 1 and row["torch_muon_ms"] > 0
        assert row["muon_share"] == pytest.approx(row["muon_ms"] / row["step_ms"])
    assert (tmp_path / "figures.png").read_bytes()[:4] == b"\x89PNG"


def test_programs():
    large = "import time; b = b'x' * 10**8; time.sleep(.4); print(7)"
    took, most, said = bench.program("-c", large)
    assert 0.4 < took and said == "7\n"
    if sys.platform == "linux":
        children = "import subprocess, sys; b = b'x' * 10**8; subprocess.run([sys.executable, " \
                   "'-c', 'import time; b = 10**8 * bytes([1]); time.sleep(.5)'])"
        assert 100 < most < 200 < bench.program("-c", children)[1] < 300
    endless = "import time; print('here', flush=True); time.sleep(60)"
    assert bench.program("-c", endless, until="here")[0] < 30
    assert bench.program("-c", "import os; print(os.environ['SAID'])", SAID="yes")[2] == "yes\n"
    refused(lambda: bench.program("-c", "raise SystemExit('no such thing')"), "no such thing")


def scripted(monkeypatch, seconds, on_run=lambda argv, cwd: ""):
    """Programs that take the given seconds, and 300 MB."""
    clock = iter(seconds)
    ran = []

    def program(*argv, cwd=bench.HERE, **_):
        ran.append(argv)
        said = on_run(argv, cwd)
        return (0.0 if said else next(clock)), 300.0, said

    monkeypatch.setattr(bench, "program", program)
    return ran


def test_start(monkeypatch, capsys):
    ran = scripted(monkeypatch, [9, 9, 9, 9, *(1, 2, 3, 4), *(2, 2, 2, 2), *(4, 8, 5, 6)])
    rows = bench.measure(["start", "--repeats=3"])
    assert [row["seconds"] for row in rows] == [2, 2, 3, 4] and len(ran) == 16
    assert [row["ratio"] for row in rows] == [1, 2, 1.25, 1.5]
    first_step, _ = read_config(train.TrainConfig, [*ran[3][1:]])
    assert first_step.n_embd == 384 and first_step.max_iters == 1


def test_time_to_a_loss(monkeypatch, tmp_path, capsys):
    (tmp_path / "nano" / "data").mkdir(parents=True)
    argv = ["loss", f"--nanogpt={tmp_path}/nano", f"--data_dir={tmp_path}", "--repeats=3"]
    refused(lambda: bench.measure(argv), "prepare.py shakespeare_char")
    write_data(tmp_path / "shakespeare_char", range(65), vocab_size=65)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=65, block_size=4))

    def on_run(argv, cwd):
        if "--eval_only" in argv:
            return "val loss 1.75\n" if "nanogpt" in argv[1] else "val loss 1.5\n"
        (out,) = [word[10:] for word in argv if word.startswith("--out_dir=")]
        os.makedirs(os.path.join(cwd, out), exist_ok=True)
        torch.save({"model": model.state_dict(), "model_args": vars(model.config)},
                   os.path.join(cwd, out, "ckpt.pt"))
        return ""

    scripted(monkeypatch, [10, 1, 20, 4, 30, 6], on_run)
    theirs, ours = bench.measure(argv)
    assert (theirs["seconds"], ours["seconds"], ours["ratio"]) == (20, 4, 0.2)
    assert (theirs["val_loss"], ours["val_loss"]) == (1.75, 1.5)
    assert ours["parameters"] == model.get_num_params(False)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 40, 1000])
def test_the_largest_micro_batch(limit):
    """By a search: at most an eighth below the truth, never above it, in few trials."""
    tried = []
    found = bench.largest(lambda n: tried.append(n) or n <= limit)
    assert found <= limit and limit - found <= max(0, found // 8) and len(tried) <= 16


def test_fitting(monkeypatch):
    """Out of memory is an answer, other errors are not; without a GPU it says so."""
    refused(lambda: bench.measure(["fit", *TINY]), "CUDA")

    def memory(c, theirs):
        if c.batch_size * c.n_layer > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "peak_memory", memory)
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))
    rows = bench.measure(["fit", *TINY])  # two layers, one layer
    assert [(r["micro_batch"], r["ratio"]) for r in rows] == [(5, 1.0), (10, 2.0)]
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.measure(["fit", *TINY])


def test_a_measuring_process_that_is_killed_is_one_line():
    refused(lambda: bench.apart(os._exit, 137), "was killed")


def test_preparing(monkeypatch, tmp_path, capsys):
    refused(lambda: bench.measure(["prepare"]), "--input=FILE")
    (tmp_path / "documents.txt").write_text("one<|endoftext|>\n two\n<|endoftext|>")
    script = tmp_path / "nano" / "data" / "openwebtext" / "prepare.py"
    script.parent.mkdir(parents=True)
    script.write_text('num_proc = 8\nload_dataset("openwebtext", num_proc=num_proc_load_dataset)')

    def on_run(argv, cwd):
        ours = argv[0] == "prepare.py"
        if not ours:
            text = open(argv[0]).read()
            assert f"num_proc = {os.cpu_count()}" in text and "documents.jsonl" in text
            documents = os.path.join(os.path.dirname(argv[0]), "..", "documents.jsonl")
            assert [json.loads(line)["text"] for line in open(documents)] == ["one", " two"]
        folder = next(w[11:] for w in argv if w.startswith("--data_dir=")) + "/openwebtext" \
            if ours else os.path.dirname(argv[0])
        os.makedirs(folder, exist_ok=True)
        for split in ("train", "val"):
            with open(f"{folder}/{split}.bin", "wb") as file:
                file.write(bytes(2000))
        return ""

    scripted(monkeypatch, [4, 2], on_run)
    theirs, ours = bench.measure(["prepare", f"--input={tmp_path}/documents.txt", "--repeats=1",
                                  f"--nanogpt={tmp_path}/nano"])
    assert theirs["tokens_per_s_core"] == 2000 / 4 / os.cpu_count() and ours["ratio"] == 2
    assert ours["tokens"] == 2000 and ours["peak_mb"] == 300


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_all(kind, monkeypatch, capsys):
    """Every command of the table is one that can be given, and has the words it needs."""
    asked = []

    def measure(argv):
        c, _ = read_config(bench.BenchConfig, argv, positional="command")
        for words in c.variants:
            read_config(bench.BenchConfig, [*argv, *(f"--{w}" for w in words.split())],
                        positional="command")
        asked.append((c.command, c.nanogpt))
        assert c.device == kind
        return [{"variant": c.command, "seconds": 1.0}]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device(kind))
    monkeypatch.setattr(bench, "machine", lambda _: "a machine")
    bench.main(["all", "--nanogpt=../nanoGPT", "--input=documents.txt", f"--device={kind}"])
    expected = {"speed", "decode", "memory", "data", "muon", "loss"}
    assert {command for command, _ in asked} == expected | (
        {"prepare", "start"} if kind == "cpu" else {"fit"})
    assert {nano for command, nano in asked if command == "loss"} <= {"../nanoGPT"}
    bench.main(["all", f"--device={kind}"])
    printed = capsys.readouterr().out
    assert ("not measured: it needs --input" in printed) == (kind == "cpu")


def test_memory_does_not_count_what_the_parent_had(tmp_path):
    """Linux carries getrusage's maximum over to a started process."""
    program = """
import sys, bench
if __name__ == "__main__":
    held = bytearray(2 * 10**9)
    del held
    bench.main(sys.argv[1:])
"""
    (tmp_path / "big.py").write_text(program)
    argv = ["memory", *TINY, f"--json={tmp_path}/figures.json"]
    subprocess.run([sys.executable, tmp_path / "big.py", *argv], check=True,
                   env=os.environ | {"PYTHONPATH": str(Path(bench.HERE))})
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert all(1 < row["peak_mb"] < 1000 for row in rows)
