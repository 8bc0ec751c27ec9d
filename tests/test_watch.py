"""bench.py plot, whose lines are read off the figures."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import refused, write_data
from torch.nn import functional as F

import bench
from model import GPT, GPTConfig, Template
from tools import watch

figures = pytest.importorskip("matplotlib.figure")


def lines(axes):
    """label -> (xs, ys) of what is drawn."""
    return {line.get_label(): tuple(np.asarray(line.get_data(), float)) for line in axes.lines}


def test_losses_of_several_runs(run, tmp_path, drawn, monkeypatch):
    runs = {"one": run(tmp_path / "one"), "two": run(tmp_path / "two", n_layer=1)}
    monkeypatch.chdir(tmp_path)
    for x, key, label in (("steps", "iter", "step"), ("tokens", "tokens", "tokens"),
                          ("seconds", "seconds", "wall time")):
        drawn.clear()
        bench.main(["plot", "one", f"--x={x}", "two", f"--plot={x}.png"])
        assert (tmp_path / f"{x}.png").stat().st_size > 5_000
        (axes,) = drawn[0].axes
        assert label in axes.get_xlabel() and axes.get_ylabel().endswith("(nats per byte)")
        seen = lines(axes)
        assert len(seen) == 4
        for name, records in runs.items():
            evaluated = [r for r in records if r["type"] == "eval"]
            evaluated = [r for r in evaluated if r[key] >= evaluated[-1][key] / 10]
            (xs, ys), = (line for key, line in seen.items() if key.startswith(f"{name}, eval"))
            assert ys.tolist() == [r["val_loss"] for r in evaluated]
            assert xs == pytest.approx([r[key] for r in evaluated])


def test_units_and_many_runs(run, tmp_path, drawn, monkeypatch):
    """Two units are said; of more than four runs training losses are left out, more than eight are
    refused."""
    write_data(tmp_path / "data" / "word", range(99), vocab_size=99, tokenizer="gpt2")
    run(tmp_path / "one", max_iters=1)
    run(tmp_path / "two", max_iters=1, dataset="word", data_dir=tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    drawn.clear()
    bench.main(["plot", "one", "two", "one", "one", "one", "--plot=x.png"])
    (axes,) = drawn[0].axes
    assert axes.get_ylabel().endswith("(nats per byte or nats per token)")
    assert [label.split(":")[0] for label in lines(axes)] == ["one, eval", "two, eval"]
    refused(lambda: bench.main(["plot", *["one"] * 9, "--plot=y.png"]), "9 runs", "draw several")


def small_model(**options) -> tuple[GPT, torch.Tensor]:
    """With scalars that differ, and tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16,
                          **options)).double().eval()
    with torch.no_grad():
        for p in model.parameter_roles()["scalar"].values():
            p.add_(torch.randn_like(p))
    return model, torch.randint(64, (2, 16))


@pytest.mark.parametrize("options", [
    dict(template="nesterov"), dict(template="tmm", splitting="strang"), dict(template="frozen"),
    dict(template="polyak", velocity_norm="none", ffn="hourglass", ffn_substeps="each"),
    dict(template="x0"), dict(template="skip", splitting="strang"), dict(template="normed")])
def test_substeps_by_hand(options):
    """From the states before and after each, and what its oracle says at the looked-ahead x."""
    model, idx = small_model(**options)
    found = watch.substeps(model, idx)
    memory, cosine = [], []
    with torch.no_grad():
        state = model.embed(idx, torch.arange(16)[None])
        for block in model.transformer.h:
            for step, (oracle, h) in zip(block.steps, block.split(*block.oracles()), strict=True):
                learned = {name: step.scalar(name).item() for name in step.learned}
                x, v = state[0], state[-1]
                g = learned.get("gamma", 1) * oracle(x + learned.get("mu", 0) * v)
                weight = learned.get("beta", learned.get("alpha", 0))
                state = step(oracle, state, h)
                new = state[0] - x
                h = 1 if "alpha" in learned else h
                memory.append(abs(weight) * v.square().sum(-1).sqrt().mean()
                              / (h * g.square().sum(-1).sqrt().mean()))
                cosine.append((F.normalize(new, dim=-1) * F.normalize(g, dim=-1)).sum(-1).mean())
    assert np.ravel(found["cosine"]) == pytest.approx(torch.stack(cosine).numpy(), abs=6e-5)
    assert np.shape(found["cosine"]) == (3, len(model.transformer.h[0].steps))
    if options["template"] == "normed":
        assert "memory" not in found
    else:
        assert np.ravel(found["memory"]) == pytest.approx(torch.stack(memory).numpy(), abs=6e-5)


def test_what_is_measured_does_not_change_when_the_model_does_not():
    """A quarter of gamma and four times the output matrices are the same function."""
    model, idx = small_model(template="polyak", scalar_map="softplus")
    before, loss = watch.substeps(model, idx), model(idx, idx)[1]
    with torch.no_grad():
        for block in model.transformer.h:
            for weights in (*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()):
                weights.mul_(4)
            for step in block.steps:
                step.gamma.copy_((step.scalar("gamma") / 4).expm1().log())
    assert model(idx, idx)[1].item() == pytest.approx(loss.item())
    assert watch.substeps(model, idx) == before
    assert not any("forward" in vars(step)
                   for block in model.transformer.h for step in block.steps)


@pytest.mark.parametrize("template", ["gd", "imex", "symplectic"])
def test_nothing_is_measured_of_those_without(template):
    assert watch.substeps(*small_model(template=template)) == {}


class Beside(Template):
    def forward(self, oracle, state, h=1.0):
        return state[0] + oracle(state[0]), state[1]


def test_a_scalar_that_only_some_layers_learn_is_left_out():
    model, idx = small_model(template="skip")
    for step in model.transformer.h[0].steps:
        step.__class__, step.scalar = Beside, {}.get
    assert watch.substeps(model, idx).keys() == {"cosine"}


def test_substeps_of_several_runs(run, tmp_path, drawn, monkeypatch):
    """A column for each substep; a run that has none has no points."""
    run(tmp_path / "tmm", template="tmm", max_iters=1)
    run(tmp_path / "each", template="polyak", ffn="hourglass", ffn_depth=2, ffn_substeps="each",
        max_iters=1)
    run(tmp_path / "gpt", max_iters=1)
    drawn.clear()
    monkeypatch.chdir(tmp_path)
    bench.main(["plot", "tmm", "each", "gpt", "--draw=scalars"])
    axes = drawn[0].axes
    assert [a.get_title() for a in axes] == ["substep 1", "substep 2", "substep 3", "", "", ""]
    assert ["memory" in a.get_ylabel() for a in axes] == [True, False, False, False, False, False]
    counts = [[len(line.get_xdata()) for line in a.lines] for a in axes]
    assert counts == [[2, 2, 0], [2, 2, 0], [0, 2, 0]] * 2
    bench.main(["plot", "tmm", "--draw=scalars", "--plot=one.png"])
    assert [a.get_title() for a in drawn[1].axes] == ["attention", "FFN", "", ""]


@pytest.mark.parametrize("options", [{}, dict(template="nesterov"), dict(template="imex"),
                                     dict(ffn="hourglass", splitting="strang")])
def test_the_residual_path_by_hand(options):
    model, idx = small_model(**options)
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
    refused(lambda: bench.main(["plot", "run", "--data=count", *draw]), "343 ids, more than run")
    checkpoint = torch.load("run/ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"tokenizer": {"tokenizer": "gpt2"}}, "run/ckpt.pt")
    refused(lambda: bench.main(["plot", "run", "--data=tiny", *draw]), "another tokenizer")


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


