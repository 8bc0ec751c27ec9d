"""bench.py plot, whose lines are read off the figures."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import refused
from torch.nn import functional as F

import bench
from model import GPT, GPTConfig
from tools import watch

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were made, in order."""
    made = []
    real = figures.Figure.__init__

    def keep(self, *args, **options):
        real(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(figures.Figure, "__init__", keep)
    return made


def lines(axes):
    """label -> (xs, ys) of what is drawn."""
    return {line.get_label(): tuple(np.asarray(line.get_data(), float)) for line in axes.lines}


def test_losses_of_several_runs(run, tmp_path, drawn, monkeypatch):
    runs = {"one": run(tmp_path / "one"), "two": run(tmp_path / "two", n_layer=1)}
    monkeypatch.chdir(tmp_path)
    for x, key, label in (("steps", "iter", "step"), ("tokens", "tokens", "tokens"),
                          ("seconds", "seconds", "wall time")):
        drawn.clear()
        bench.main(["plot", *runs, f"--x={x}", f"--plot={x}.png"])
        assert (tmp_path / f"{x}.png").stat().st_size > 5_000
        (axes,) = drawn[0].axes
        assert label in axes.get_xlabel() and "nats" in axes.get_ylabel()
        seen = lines(axes)
        assert len(seen) == 4
        for name, records in runs.items():
            evaluated = [r for r in records if r["type"] == "eval"]
            (xs, ys), = (line for key, line in seen.items() if key.startswith(f"{name}, eval"))
            assert ys.tolist() == [r["val_loss"] for r in evaluated]
            assert xs == pytest.approx([r[key] for r in evaluated])


def test_scalars_of_two_runs(run, tmp_path, drawn, monkeypatch, capsys):
    runs = {name: run(tmp_path / name, template=name) for name in ("tmm", "polyak")}
    run(tmp_path / "gpt")
    drawn.clear()
    monkeypatch.chdir(tmp_path)
    bench.main(["plot", *runs, "gpt", "--draw=scalars"])
    assert "no learned scalars in gpt" in capsys.readouterr().out
    assert (tmp_path / "scalars.png").stat().st_size > 10_000
    axes = drawn[0].axes
    assert [a.get_ylabel() for a in axes[::2]] == ["mu", "beta", "gamma", "nu"]
    last = {name: [r["scalars"] for r in records if "scalars" in r]
            for name, records in runs.items()}
    by_layer, over_time = axes[2:4]  # beta, of both
    assert lines(by_layer)["tmm, attention"][1].tolist() == [row[0] for row in
                                                             last["tmm"][-1]["beta"]]
    assert lines(by_layer)["polyak, FFN"][1].tolist() == [row[1] for row in
                                                                last["polyak"][-1]["beta"]]
    first = over_time.lines[0].get_data()
    assert first[0].tolist() == [0, 3, 6]
    assert first[1] == pytest.approx([np.mean(np.array(r["beta"])[:, 0]) for r in last["tmm"]])
    assert len(axes[0].lines) == 2  # only tmm has mu


def test_every_substep_has_a_line_of_its_own(run, tmp_path, drawn):
    run(tmp_path, template="tmm", ffn="hourglass", ffn_depth=5, ffn_substeps="each", max_iters=2)
    drawn.clear()
    bench.main(["plot", str(tmp_path), "--draw=scalars", f"--plot={tmp_path}/scalars.png"])
    styles = [(line.get_color(), line._dash_pattern) for line in drawn[0].axes[0].lines]
    assert len(styles) == 6 == len(set(map(str, styles)))


@pytest.mark.parametrize("options", [{}, dict(template="nesterov"), dict(template="imex"),
                                     dict(ffn="hourglass", splitting="strang")])
def test_the_residual_path_by_hand(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16,
                          **options)).double().eval()
    idx = torch.randint(64, (2, 16))
    lengths, angles = watch.residual_path(model, idx)
    with torch.no_grad():
        state = model.embed(idx, torch.arange(16)[None])
        xs = [state[0]]
        for block in model.transformer.h:
            state = block(state)
            xs.append(state[0])
    d = [b - a for a, b in zip(xs, xs[1:], strict=False)]
    assert lengths == pytest.approx([v.square().sum(-1).sqrt().mean().item() for v in d])
    for angle, a, b in zip(angles, d, d[1:], strict=False):
        cosine = (a * b).sum(-1) / (F.normalize(a, dim=-1) * a).sum(-1) / b.pow(2).sum(-1).sqrt()
        assert angle == pytest.approx(cosine.acos().mean().item() * 180 / math.pi)
    assert not any(block._forward_hooks or block._forward_pre_hooks
                   for block in model.transformer.h)


def test_the_path_of_a_file_and_of_a_folder(run, tmp_path, data_dir, drawn, monkeypatch):
    run(tmp_path / "run", template="nesterov", n_layer=3)
    draw = ["--draw=path", f"--data_dir={data_dir}", "--plot=path.png"]
    monkeypatch.chdir(tmp_path)
    bench.main(["export", "--ckpt=run", "--format=safetensors", "--out=folder"])
    drawn.clear()
    bench.main(["plot", "run", "run/ckpt.pt", "folder", "--data=tiny", *draw])
    first, *others = [line.get_ydata().tolist() for line in drawn[0].axes[0].lines]
    assert others == [first, first] and len(first) == 3 and min(first) > 0
    assert len(drawn[0].axes[1].lines[0].get_xdata()) == 2
    refused(lambda: bench.main(["plot", "folder", *draw]), "--data=NAME")
    refused(lambda: bench.main(["plot", "run", "--data=count", *draw]), "343 token ids")


@pytest.mark.parametrize("draw", ["losses", "scalars", "path"])
def test_names_are_shown_as_they_are(run, tmp_path, drawn, monkeypatch, draw):
    """No mathematics, none left out of the legend."""
    names = {"lr$1e_$3": "lr$1e_$3", "_x": " _x", "a\nb": "a\\nb", "caf\udce9": "caf\\udce9"}
    monkeypatch.chdir(tmp_path)
    for name in names:
        run(name, template="polyak", max_iters=1)
    drawn.clear()
    bench.main(["plot", *names, f"--draw={draw}", "--plot=x.png"])
    assert (tmp_path / "x.png").stat().st_size > 5_000
    legend, = drawn[0].legends or [drawn[0].axes[0].get_legend()]
    texts = [re.split("[:,]", text.get_text())[0] for text in legend.get_texts()]
    assert list(dict.fromkeys(texts)) == list(names.values())


def test_what_matplotlib_raises_is_one_line(run, tmp_path, monkeypatch):
    run(tmp_path, max_iters=1)
    monkeypatch.setattr(figures.Figure, "add_subplot", lambda *_, **__: 1 / 0)
    plot = ["plot", str(tmp_path), f"--plot={tmp_path}/x.png"]
    refused(lambda: bench.main(plot), "x.png cannot be drawn: ZeroDivisionError")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(lambda: bench.main(plot), "pip install -U matplotlib")


@pytest.mark.parametrize("command, said", [
    ("plot", "plot OUT_DIR"), ("plot none", "none"), ("plot none --x=miles", "miles"),
    ("plot gd --draw=scalars", "momentum"), ("plot gd --plot=no/x.png", "no/x.png"),
    ("plot lone", "no losses"), ("plot lone --draw=path", "ckpt.pt"),
    ("plot gd --plot=x.pdf", ".png"),
    ("plot broken", "log.jsonl")])
def test_what_cannot_be_drawn_is_one_line(run, tmp_path, monkeypatch, command, said):
    run(tmp_path / "gd", max_iters=1)
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "log.jsonl").write_text('{"type": "config"}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "log.jsonl").write_text('#"type": "train"}\n')
    monkeypatch.chdir(tmp_path)
    refused(lambda: bench.main(command.split()), said)
    assert not list(tmp_path.glob("*.png"))


