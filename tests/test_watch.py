"""Watching runs: what is logged, and `bench.py plot`, whose lines are read off the figures."""

import contextlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_train import refused
from torch.nn import functional as F

import bench
import train
from model import GPT, GPTConfig
from support.checkpoint import read_checkpoint
from tools.findings import draw_curves

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


@contextlib.contextmanager
def folder(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(path)
        yield


def lines(axes):
    """label -> (xs, ys) of what is drawn."""
    return {line.get_label(): tuple(np.asarray(line.get_data(), float)) for line in axes.lines}


def test_the_picture_is_refreshed_at_every_evaluation(run, pictures, tmp_path, monkeypatch):
    drawn_at = []
    real = train.plot_losses
    monkeypatch.setattr(train, "plot_losses", lambda dirs, path, *more: (
        real(dirs, path, *more),
        drawn_at.append(len([r for r in train.read_log(tmp_path) if r["type"] == "eval"]))))
    run(tmp_path)
    assert drawn_at[:3] == [1, 2, 3] and (tmp_path / "loss.png").stat().st_size > 5_000


@pytest.mark.parametrize("template, names", [
    ("gd", []), ("polyak", ["beta", "gamma"]), ("tmm", ["mu", "beta", "gamma", "nu"]),
    ("imex", ["gamma_a", "gamma_m", "beta"])])
def test_learned_scalars_are_logged_at_evaluations(run, tmp_path, template, names):
    records = [r["scalars"] | {"iter": r["iter"]} for r in run(
        tmp_path, template=template, scalar_lr=0.3) if "scalars" in r]
    assert [r["iter"] for r in records] == ([0, 3, 6] if names else [])
    weights = read_checkpoint(tmp_path / "ckpt.pt")["model"]
    for name in names:
        logged = np.array(records[-1][name])
        assert logged.shape == (2, 1 if template == "imex" else 2)
        for layer, row in enumerate(logged):
            for k, value in enumerate(row):
                raw = weights[f"transformer.h.{layer}.steps.{k}.{name}"].double().item()
                exact = 1 / (1 + math.exp(-raw)) if name in ("mu", "beta") \
                    else math.log1p(math.exp(raw))
                assert value == pytest.approx(exact, rel=1e-6)
        assert np.abs(logged - np.array(records[0][name])).max() > 1e-3  # they are learned


def test_a_resumed_runs_clock_goes_on(run, tmp_path, monkeypatch):
    """However long the resumed process takes to its first record."""
    seconds = []
    for step, options in (1, {}), (1000, dict(max_iters=5, init_from="resume")):
        clock = itertools.count(0, step)  # so long takes each call of time.time()
        monkeypatch.setattr(train.time, "time", lambda clock=clock: float(next(clock)))
        run(tmp_path, **{"max_iters": 3} | options)
        seconds.append([r["seconds"] for r in train.read_log(tmp_path) if "seconds" in r])
    first, both = seconds
    assert both[:len(first)] == first and 0 < first[-1] < 1000 < both[-1]
    assert {s % 1000 for s in both[len(first):]} == {first[-1]}


def test_seconds_go_on_over_an_interruption(tmp_path):
    log = [{"type": "config"}, *({"type": "train", "iter": i, "seconds": s}
                                 for i, s in enumerate((1.0, 4.0, 0.5, 2.0, 1.0)))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"type": "tr')
    assert [r["seconds"] for r in train.read_log(tmp_path)[1:]] == [1.0, 4.0, 4.5, 6.0, 7.0]


def test_a_damaged_log_or_picture_does_not_end_a_run(run, pictures, words, tmp_path):
    run(tmp_path, max_iters=3)
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"#" + log.read_bytes()[1:])  # of the same length
    (tmp_path / "loss.png").unlink()
    (tmp_path / "loss.png").mkdir()
    train.main(["--init_from=resume", *words(tmp_path)])
    assert read_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 6
    refused(lambda: bench.main(["plot", str(tmp_path), f"--plot={tmp_path}/x.png"]), "log.jsonl")


@pytest.mark.parametrize("x, label", [("steps", "step"), ("tokens", "tokens"),
                                      ("seconds", "wall time"), ("flops", "FLOPs")])
def test_losses_of_several_runs(run, tmp_path, drawn, monkeypatch, x, label):
    runs = {"one": run(tmp_path / "one"), "two": run(tmp_path / "two", n_layer=1)}
    drawn.clear()
    with folder(tmp_path, monkeypatch):
        bench.main(["plot", "one", "two/", f"--x={x}", "--plot=all.png"])
    assert (tmp_path / "all.png").stat().st_size > 5_000
    (axes,) = drawn[0].axes
    assert label in axes.get_xlabel() and "nats" in axes.get_ylabel()
    seen = lines(axes)
    assert len(seen) == 4
    for name, records in runs.items():
        evaluated = [r for r in records if r["type"] == "eval"]
        (xs, ys), = (line for key, line in seen.items() if key.startswith(f"{name}, eval"))
        assert ys.tolist() == [r["val_loss"] for r in evaluated]
        model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2 if name == "one" else 1,
                              n_head=2, n_embd=32))
        factor = model.flops_per_token() if x == "flops" else 1
        key = {"steps": "iter", "seconds": "seconds"}.get(x, "tokens")
        assert xs == pytest.approx([r[key] * factor for r in evaluated])


def test_scalars_of_two_runs(run, tmp_path, drawn):
    runs = {name: run(tmp_path / name, template=name, scalar_lr=0.3) for name in ("tmm", "polyak")}
    drawn.clear()
    bench.main(["plot", *(str(tmp_path / name) for name in runs), "--draw=scalars",
                f"--plot={tmp_path}/scalars.png"])
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
    lengths, angles = model.residual_path(idx)
    with torch.no_grad():
        state = model.embed(idx)
        xs = [state[0]]
        for block in model.transformer.h:
            state = block(state)
            xs.append(state[0])
    d = [b - a for a, b in zip(xs, xs[1:], strict=False)]
    assert lengths == pytest.approx([v.square().sum(-1).sqrt().mean().item() for v in d])
    for angle, a, b in zip(angles, d, d[1:], strict=False):
        cosine = (a * b).sum(-1) / (F.normalize(a, dim=-1) * a).sum(-1) / b.pow(2).sum(-1).sqrt()
        assert angle == pytest.approx(cosine.acos().mean().item() * 180 / math.pi)
    assert not any(block._forward_hooks for block in model.transformer.h)


def test_runs_of_one_name_and_runs_without_scalars(run, tmp_path, drawn, capsys):
    run(tmp_path / "a" / "out", template="tmm")
    run(tmp_path / "b" / "out", template="polyak")
    run(tmp_path / "gpt")
    drawn.clear()
    runs = [str(tmp_path / name) for name in ("a/out", "b/out", "gpt")]
    bench.main(["plot", *runs, "--draw=scalars", f"--plot={tmp_path}/scalars.png"])
    (legend,) = drawn[0].legends
    assert {text.get_text().split(",")[0] for text in legend.get_texts()} <= set(runs[:2])
    assert "no learned scalars in gpt" in capsys.readouterr().out
    for draw, picture in enumerate(("losses", "path"), 1):
        bench.main(["plot", *runs, f"--draw={picture}", f"--plot={tmp_path}/x.png"])
        labels = {name.split(", ")[0].split(": ")[0] for name in lines(drawn[draw].axes[0])}
        assert labels == {*runs[:2], "gpt"}


def test_a_path_of_data_that_moved(run, tmp_path, data_dir, monkeypatch):
    run(tmp_path / "gpt", n_layer=3)
    log = torch.load(tmp_path / "gpt" / "ckpt.pt", weights_only=True)
    log["config"]["data_dir"] = str(tmp_path / "gone")
    torch.save(log, tmp_path / "gpt" / "ckpt.pt")
    bench.main(["plot", str(tmp_path / "gpt"), "--draw=path", f"--data_dir={data_dir}",
                f"--plot={tmp_path}/path.png"])
    assert (tmp_path / "path.png").exists()


def test_the_path_of_a_file_and_of_a_folder(run, tmp_path, data_dir, drawn, monkeypatch):
    run(tmp_path / "run", template="nesterov", n_layer=3)
    draw = ["--draw=path", f"--data_dir={data_dir}", "--plot=path.png"]
    with folder(tmp_path, monkeypatch):
        bench.main(["export", "--ckpt=run", "--format=safetensors", "--out=folder"])
        drawn.clear()
        bench.main(["plot", "run", "run/ckpt.pt", "folder", "--data=tiny", *draw])
        first, *others = [line.get_ydata().tolist() for line in drawn[0].axes[0].lines]
        assert others == [first, first]
        refused(lambda: bench.main(["plot", "folder", *draw]), "--data=NAME")
        refused(lambda: bench.main(["plot", "run", "--data=count", *draw]), "343 token ids")


def test_paths_of_two_runs(run, tmp_path, drawn):
    for name, template in (("gpt", "gd"), ("yurii", "nesterov")):
        run(tmp_path / name, template=template, n_layer=3)
    drawn.clear()
    bench.main(["plot", str(tmp_path / "gpt"), str(tmp_path / "yurii"), "--draw=path",
                f"--plot={tmp_path}/path.png"])
    assert (tmp_path / "path.png").stat().st_size > 10_000
    lengths, turns = drawn[0].axes
    assert [len(line.get_xdata()) for line in lengths.lines + turns.lines] == [3, 3, 2, 2]
    assert all((line.get_ydata() > 0).all() for line in lengths.lines)


@pytest.mark.parametrize("command, said", [
    ("plot", "plot OUT_DIR"), ("plot none", "none"), ("plot none --x=miles", "miles"),
    ("plot gd --draw=scalars", "momentum"), ("plot gd --plot=no/x.png", "no/x.png"),
    ("plot lone --x=flops", "checkpoint"), ("plot lone --draw=path", "checkpoint"),
    ("plot lone", "no losses"), ("plot gd --plot=x.pdf", ".png"),
    ("eval --ckpt=gd --tasks=", "--tasks=hellaswag"),
    ("eval --ckpt=gd --data=x --json=none/x.json", "json=none/x.json: there is no folder none"),
    ("eval --ckpt=gd --data=x --limit=3", "eval_tokens")])
def test_what_cannot_be_drawn_is_one_line(run, tmp_path, monkeypatch, command, said):
    run(tmp_path / "gd", max_iters=1)
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "log.jsonl").write_text('{"type": "config"}\n')
    with folder(tmp_path, monkeypatch):
        refused(lambda: bench.main(command.split()), said)
    assert not list(tmp_path.glob("*.png"))


def test_a_studys_curves_over_seconds_are_means_over_its_seeds(tmp_path, drawn):
    runs = [{"variant": "a", "steps": 2, "seconds": s, "curve": [[0, 5.0], [1, loss], [2, 1.0]]}
            for s, loss in ((8.0, 2.0), (16.0, 3.0))]
    draw_curves(runs, str(tmp_path / "x.png"), "seconds")
    ((xs, ys),) = lines(drawn[0].axes[0]).values()
    assert (xs.tolist(), ys.tolist()) == ([0, 6, 12], [5, 2.5, 1])
