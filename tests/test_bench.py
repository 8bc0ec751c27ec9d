"""bench.py: it measures what it says, on models so small that their figures mean nothing."""

import json
import statistics

import pytest
import torch
from test_train import refused

import bench
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
