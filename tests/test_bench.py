"""bench.py: it measures what it says, on models so small that their figures mean nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import refused

import bench
from config import read_config
from model import GPT, GPTConfig
from tools import gpu, race
from tools.gpu import GPUConfig, commands
from tools.race import HERE
from train import TrainConfig

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--vocab_size=64",
        "--batch_size=2", "--gradient_accumulation_steps=2", "--device=cpu", "--dtype=float32",
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


@pytest.mark.parametrize("command", ["speed", "decode"])
def test_every_command(command, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    argv = [command, *TINY, f"--json={tmp_path}/figures.json", "--repeats=3"]
    names = ["template=gd", "template=tmm n_layer=1"]
    if command == "decode":  # speed would compile
        argv += ["--max_new_tokens=20", f"--nanogpt={tmp_path}"]
        names.append("nanogpt")
    else:
        argv.append("--steps=2")
    bench.main(argv)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == names
    assert all(name in printed for name in names) and "torch" in printed
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64, bias=False)
    for row, options in zip(rows, (dict(), dict(template="tmm", n_layer=1)), strict=False):
        assert row["parameters"] == GPT(GPTConfig(**shape | options)).get_num_params(False)
        assert all(v > 0 for k, v in row.items() if k != "variant")
    if command == "speed":
        flops = GPT(GPTConfig(**shape)).flops_per_token()
        assert rows[0]["mflop_per_token"] == pytest.approx(flops / 1e6)
        assert 0 < rows[0]["share_of_peak"] < 1


def test_the_step_that_is_measured_trains(monkeypatch):
    """The loss of a variant falls on the data that it reads."""
    config = bench.read_options(["speed", *TINY, "--vocab_size=2", "--learning_rate=1e-2"])
    losses, real = [], bench.accumulate

    def watched(*arguments):
        losses.append(real(*arguments).item())
        return torch.tensor(losses[-1])

    def zeros(_):
        while True:
            yield torch.zeros(2, 17, dtype=torch.int32)

    monkeypatch.setattr(bench, "accumulate", watched)
    monkeypatch.setattr(bench, "random_batches", zeros)
    bench.training("", config, 60).run()
    assert len(losses) == 60 and losses[-1] < 0.1 * losses[0]


def test_nanogpts_steps_train_too(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    config = bench.read_options(["speed", *TINY, f"--nanogpt={tmp_path}", "--learning_rate=1e-2"])
    variant = race.nanogpt_training(config, 3, compiled=False)
    before = race.nanogpt_model(config).lm_head.weight
    variant.run()
    (cell,) = [c.cell_contents for c in variant.run.__closure__
               if isinstance(c.cell_contents, GPT)][:1]
    assert (cell.lm_head.weight - before).abs().max() > 1e-3
    assert variant.tokens == 3 * 2 * 2 * 16 and variant.name == "nanogpt"


def test_random_batches_are_like_the_trainers():
    config = bench.read_options(["speed", *TINY])
    rows = next(bench.random_batches(config))
    assert rows.shape == (2, 17) and 0 <= rows.min() and 55 < rows.max() < 64


@pytest.mark.parametrize("argv, said", [
    ([], ["speed | decode"]), (["sped"], ["no command sped", "speed"]),
    (["decode", *TINY, "--nanogpt=nowhere"], ["nowhere/model.py", "No such file"]),
    (["speed", *TINY, "--variants", "n_layr=1"], ["n_layr", "n_layer"]),
    (["speed", "--repeats=0"], ["repeats=0", "at least 1"]),
    (["speed", *TINY, "--variants", "n_layer=1", "deterministic=True"], ["deterministic", "all"]),
    (["speed", "--max_new_tokens=3"], ["unknown option max_new_tokens"]),
    (["plot", "out", "--n_layer=3"], ["unknown option n_layer"]),
    (["eval", "--ckpt=gd", "--data=x", "--json=none/x.json"], ["there is no folder none"])])
def test_mistakes(argv, said):
    assert len(refused(lambda: bench.main(argv), *said)) == 1


def test_a_full_disk_is_said_of_the_file(tmp_path):
    argv = ["speed", *TINY, "--json=/dev/full"]
    refused(lambda: bench.measure(argv, bench.read_options(argv), lambda *_: [{"variant": "x"}]),
            "/dev/full: No space")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.COMMANDS, "convert", (bench.ConvertConfig, full))
        refused(lambda: bench.main(["convert", "--ckpt=x.pt", f"--out={tmp_path}/y.pt"]),
                f"{tmp_path}/y.pt: No space")


def test_help_is_of_the_command(capsys):
    """Only its own options; --help alone has a line for each command."""
    for argv in ["--help"], ["plot", "--help"], ["decode", "--help"]:
        with pytest.raises(SystemExit) as end:
            bench.main(argv)
        assert end.value.code == 0
        printed = capsys.readouterr().out
        if argv == ["--help"]:
            assert all(f"\n  {name} " in printed for name in bench.COMMANDS)
        own = "--draw" in printed, "--n_layer" in printed, "--num_samples" in printed
        assert own == {"--help": (False,) * 3, "plot": (True, False, False),
                       "decode": (False, True, True)}[argv[0]]


def killed(*_):
    os._exit(137)


def test_a_measuring_process_that_is_killed_is_one_line(monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", killed)
    refused(lambda: bench.main(["memory", *TINY]), "was killed")


def test_memory_does_not_count_what_the_parent_had(tmp_path):
    """Linux carries getrusage's maximum over to a started process. Nothing is imported before it is
    needed."""
    program = """
import sys, bench
assert not {"lm_eval", "transformers", "datasets", "matplotlib"} & set(sys.modules)
if __name__ == "__main__":
    held = bytearray(2 * 10**9)
    del held
    bench.main(sys.argv[1:])
"""
    (tmp_path / "big.py").write_text(program)
    argv = ["memory", *TINY, f"--json={tmp_path}/figures.json"]
    subprocess.run([sys.executable, tmp_path / "big.py", *argv], check=True,
                   env=os.environ | {"PYTHONPATH": HERE})
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["template=gd", "template=tmm n_layer=1"]
    assert all(1 < row["peak_mb"] < 1000 for row in rows) and rows[0]["ratio"] == 1.0


@pytest.mark.parametrize("tiny", [True, False])
def test_what_make_gpu_measures_can_be_measured(tiny):
    """Its commands are bench.py's, with options that fit together."""
    for rows in commands(GPUConfig(nanogpt="../nanoGPT", tiny=tiny)).values():
        for argv in rows.values():
            assert bench.read_options(argv).device is None


def test_several_gpus(monkeypatch, tmp_path):
    """Each run has train.py's options, and the micro-batches of one GPU."""
    def program(*argv):
        config, _ = read_config(TrainConfig, argv[argv.index("train.py") + 1:])
        count = config.gradient_accumulation_steps // 4
        assert f"--nproc_per_node={count}" in argv and config.n_embd == 768
        os.mkdir(config.out_dir)
        record = json.dumps({"type": "train", "tokens_per_s": 100.0 if count == 1 else 150.0})
        (tmp_path / f"out-{count}" / "log.jsonl").write_text(f"{record}\n" * 3)

    monkeypatch.setattr(gpu, "program", program)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    one, two = gpu.scaling(str(tmp_path))
    assert (two["variant"], two["tokens_per_s"], two["ratio"]) == ("2 GPUs", 150.0, 0.75)
