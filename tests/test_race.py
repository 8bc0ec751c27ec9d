"""tools/race.py: figures of turns, programs beside nanoGPT's, in scripted seconds."""

import json
import math
import os
import statistics
import sys

import pytest
import torch
from conftest import refused, write_data

import bench
import train
from config import read_config
from model import GPT, GPTConfig
from tools import race


def test_figures_are_of_the_times(monkeypatch):
    """Two variants in turn, of which the second does half the work, in scripted seconds."""
    times = iter([9.0, 8.0, 3.0, 3.0, *(1.0, 2.0, 4.0, 2.0, 2.0, 8.0)])
    ran = []
    monkeypatch.setattr(race, "seconds", lambda run, _: (run(), next(times))[1])
    cpu = torch.device("cpu")
    a, b = (race.Variant(n, lambda n=n: ran.append(n), tokens, 7, cpu)
            for n, tokens in (("a", 100), ("b", 50)))
    first, second = race.alternate([a, b], 3)
    assert "".join(ran) == "abab" + "ababab"
    assert (first["warm_up_s"], second["warm_up_s"]) == (9.0, 8.0)
    assert (first["low"], first["tokens_per_s"], first["high"]) == (25.0, 50.0, 100.0)
    assert (second["low"], second["tokens_per_s"], second["high"]) == (6.25, 25.0, 25.0)
    assert first["ratio"] == 1.0
    assert second["ratio"] == statistics.median([25 / 100, 25 / 25, 6.25 / 50])


def test_programs():
    """Their time and memory, those of the processes that they start included."""
    seconds, most = race.program("-c", "import time; b = b'x' * 10**8; time.sleep(.4)")
    assert 0.4 < seconds
    if sys.platform == "linux":
        children = "import subprocess, sys; b = b'x' * 10**8; subprocess.run([sys.executable, " \
                   "'-c', 'import time; b = 10**8 * bytes([1]); time.sleep(.5)'])"
        assert 100 < most < 200 < race.program("-c", children)[1] < 300
    race.program("-c", "import os; assert os.environ['SAID'] == 'yes'", SAID="yes")
    refused(lambda: race.program("-c", "raise SystemExit('no such thing')"), "no such thing",
            "failed, as it says above")


def scripted(monkeypatch, seconds, on_run):
    """Programs that take the given seconds, and 300 MB."""
    times = iter(seconds)

    def program(*argv, cwd=race.HERE, **_):
        on_run(argv, cwd)
        return next(times), 300.0

    monkeypatch.setattr(race, "program", program)


def test_time_to_a_loss(monkeypatch, tmp_path):
    """The losses are those of the checkpoints on the whole validation split."""
    (tmp_path / "nano" / "data").mkdir(parents=True)
    argv = ["loss", f"--nanogpt={tmp_path}/nano", f"--data_dir={tmp_path}", "--repeats=3",
            "--device=cpu"]
    refused(lambda: bench.main(argv), "prepare.py shakespeare_char")
    write_data(tmp_path / "shakespeare_char", range(65), vocab_size=65, tokenizer="char",
               alphabet="".join(map(chr, range(33, 98))))
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=65, block_size=4))

    def on_run(argv, cwd):
        (out,) = [word[10:] for word in argv if word.startswith("--out_dir=")]
        os.makedirs(os.path.join(cwd, out), exist_ok=True)
        ours = f"--data_dir={tmp_path}" in argv
        with torch.no_grad():
            model.transformer.wte.weight.fill_(1.0 if ours else 0.0)
        torch.save({"model": model.state_dict(), "model_args": vars(model.config),
                    "config": {"dataset": "shakespeare_char"}}, os.path.join(cwd, out, "ckpt.pt"))
        if ours:
            assert read_config(train.TrainConfig, [*argv[1:]])[0].n_embd > 64

    scripted(monkeypatch, [10, 1, 20, 4, 30, 6], on_run)
    nanogpt, ours = race.time_to_loss(bench.read_options(argv))
    assert (nanogpt["seconds"], ours["seconds"], ours["ratio"]) == (20, 4, 0.2)
    assert nanogpt["val_loss"] == pytest.approx(math.log(65))  # of a table of zeros
    refused(lambda: bench.main([*argv, f"--nanogpt={tmp_path}/none"]), "none", "No such file")


def test_preparing(monkeypatch, tmp_path):
    refused(lambda: bench.main(["prepare"]), "--input=FILE")
    refused(lambda: bench.main(["prepare", f"--input={tmp_path}/none.txt", "--repeats=1",
                                f"--nanogpt={tmp_path}"]), "none.txt", "No such file")
    (tmp_path / "documents.txt").write_text("one<|endoftext|>\n two\n<|endoftext|>")
    script = tmp_path / "nano" / "data" / "openwebtext" / "prepare.py"
    script.parent.mkdir(parents=True)
    script.write_text('num_proc = 8\nload_dataset("openwebtext", num_proc=num_proc_load_dataset)')

    def on_run(argv, cwd):
        if argv[0] == "prepare.py":
            folder = f"{argv[3].removeprefix('--data_dir=')}/openwebtext"
        else:
            folder = os.path.dirname(argv[0])
            text = open(argv[0]).read()
            assert f"num_proc = {race.CORES}" in text and "documents.jsonl" in text
            documents = os.path.join(os.path.dirname(argv[0]), "..", "documents.jsonl")
            assert [json.loads(line)["text"] for line in open(documents)] == ["one", " two"]
        os.makedirs(folder, exist_ok=True)
        for split in ("train", "val"):
            with open(f"{folder}/{split}.bin", "wb") as file:
                file.write(bytes(2000))

    scripted(monkeypatch, [4, 2], on_run)
    nanogpt, ours = race.preparing(race.PreparingConfig(
        input=f"{tmp_path}/documents.txt", repeats=1, nanogpt=f"{tmp_path}/nano"))
    assert nanogpt["tokens_per_s_core"] == 2000 / 4 / race.CORES and ours["ratio"] == 2
    assert ours["tokens"] == 2000 and ours["peak_mb"] == 300
