"""support/log.py: log.jsonl, what is printed, loss.png, wandb and tensorboard."""

import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    as_killed_at_3,
    in_ranks,
    load,
    of_kind,
    records,
    refused,
    scripted,
    steps_of,
)

import train
from model import GPT, GPTConfig
from support import checkpoint, log
from support.code import code_in
from support.log import Log, learned_scalars
from support.resume import Progress
from support.terminal import show
from train import TrainConfig


def test_the_log(run, tmp_path):
    found = run(tmp_path, max_iters=5, eval_interval=2, log_interval=2, eval_iters=2)
    config = found[0]
    assert config["type"] == "config" and config["n_layer"] == 2 and config["eval_tokens"] == 128
    assert set(TrainConfig.__dataclass_fields__) - {"vocab_used"} <= config.keys()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {"type": "config", **stored, "code": code_in()} == config
    for name in ("model.py", "train.py"):
        kept = (tmp_path / "code_that_ran" / code_in()["hash"] / name).read_text()
        assert kept == Path(train.__file__).with_name(name).read_text()
    assert [(r["type"], r["iter"]) for r in found[1:]] == [
        ("eval", 0), ("train", 0), ("eval", 2), ("train", 2), ("eval", 4), ("train", 4),
        ("eval", 5)]
    for r in of_kind(found, "train"):
        assert r["tokens"] == (r["iter"] + 1) * 128 and r["tokens_per_s"] > 0 and r["mfu"] is None
        assert 4 < r["loss"] < 7 and r["grad_norm"] > 0 and 0 < r["lr"] <= 1e-3
    for r in of_kind(found, "eval"):
        assert r["tokens"] == r["iter"] * 128 and 4 < r["best_val_loss"] <= r["val_loss"] < 7
    seconds = [r["seconds"] for r in found[1:]]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_log_is_cut_even_if_nothing_was_written_since(tmp_path):
    """A run resumed at step 10 and stopped before its next record keeps the right length."""
    config, here = TrainConfig(out_dir=str(tmp_path)), (torch.device("cpu"), 1)
    log = Log(config, Progress(), None, *here)
    log.record("train", 0, loss=1.0)
    length = log.length()
    log.record("train", 15, loss=2.0)
    assert Log(config, Progress(log_length=length), None, *here).length() == length


def test_a_log_that_lost_its_end_goes_on_with_a_new_line(run, tmp_path):
    run(tmp_path, max_iters=3)
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole[:-20])
    found = run(tmp_path, init_from="resume", max_iters=4)
    assert steps_of(found) == [0, 1, 2, 3]


def test_a_log_says_where_other_code_goes_on(run, tmp_path, monkeypatch, capsys):
    """Also where that is the first code again; the files of both are kept."""
    run(tmp_path, max_iters=2)
    for code, iters in (("new", 4), (code_in()["hash"], 6)):
        for module in (log, checkpoint):
            monkeypatch.setattr(module, "code_in", lambda c=code: {"hash": c, "commit": "unknown"})
        assert "the code has changed" not in capsys.readouterr().out
        found = run(tmp_path, max_iters=iters, init_from="resume")
        assert "warning: the code has changed" in capsys.readouterr().out
    hashes = [r["code"]["hash"] for r in found if r["type"] == "config"]
    assert hashes == [code, "new", code] and steps_of(found) == [0, 1, 2, 3, 4, 5]
    assert {p.name for p in (tmp_path / "code_that_ran").iterdir()} == {code, "new"}


def test_json_has_no_nan(run, tmp_path):
    """It stands as null, in the learned scalars too."""
    found = run(tmp_path, max_iters=1, template="polyak",
                hooks=[partial(scripted, [math.nan, 1.0]), lambda patch: patch.setattr(
                    log, "learned_scalars", lambda _: {"beta": [[math.inf]]})])
    assert (found[1]["val_loss"], found[1]["scalars"]) == (None, {"beta": [[None]]})


def test_only_options_that_are_not_the_defaults_are_printed(words, run, tmp_path, capsys):
    """One a line; and what follows from them. Also where the shape comes from a checkpoint."""
    run(tmp_path / "a")
    capsys.readouterr()
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    argv = words(tmp_path / "b", init_from=tmp_path / "a" / "ckpt.pt", max_iters=1, eval_iters=3,
                 bias=False, schedule="cosine", min_lr=1e-4)
    train.main([word for word in argv if not word.startswith(tuple(f"--{n}=" for n in shape))])
    out = capsys.readouterr().out
    printed = dict(line.split(" = ", 1) for line in out.splitlines()
                   if " = " in line.split(":")[0])
    expected = {name: repr(value) for name, value in TINY.items()} | dict(
        data_dir=printed["data_dir"], out_dir=repr(str(tmp_path / "b")), dataset="'tiny'",
        init_from=repr(str(tmp_path / "a" / "ckpt.pt")), max_iters="1", vocab_size="257",
        min_lr="0.0001", eval_tokens="192", eval_iters="3 means eval_tokens = 192")
    assert printed == expected
    assert {records(tmp_path / "b")[0][name] == TINY[name] for name in shape} == {True}
    assert "33,472 parameters" in out and "128 tokens = 2 micro-batches of 4 x 16" in out
    assert "343 training and 300 validation tokens, 257 ids" in out
    assert "run:    1 steps, 2 of warm-up, 0.37 epochs" in out


def test_the_loss_curve(run, pictures, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    run(tmp_path)
    pixels = image.imread(tmp_path / "loss.png")[..., :3]
    coloured = np.ptp(pixels, axis=-1) > 0.3
    assert min(pixels.shape[:2]) > 200 and (pixels == 1).all(axis=-1).mean() > 0.5
    assert coloured.sum() > 200  # the curves, not only axes and letters


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(run, pictures, tmp_path, monkeypatch,
                                                           capsys):
    """Of no number yet, or without matplotlib."""
    run(tmp_path / "nan", hooks=[partial(scripted, [math.nan, 1.0])], max_iters=1)
    assert "warning" not in capsys.readouterr().err
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    run(tmp_path / "none", max_iters=1)
    assert not (tmp_path / "none" / "loss.png").exists()


class Sink:
    """A fake of wandb's run and of tensorboard's writer, that keeps or raises."""

    def __init__(self, error=None):
        self.error, self.seen, self.opened = error, [], []

    def add_scalar(self, name, value, step):
        if self.error:
            raise self.error
        self.seen.append((name, float(value), step))

    def log(self, values, step):
        for name, value in values.items():
            self.add_scalar(name, value, step)

    def flush(self):
        pass

    def open(self, *_, **options):
        self.opened.append(options)
        return self

    def install(self, patch):
        for module, name in (("wandb", "init"), ("torch.utils.tensorboard", "SummaryWriter")):
            patch.setitem(sys.modules, module, SimpleNamespace(**{name: self.open}))


def failing(patch):
    """All that a run can do without raises."""
    def draw(_):
        raise RuntimeError("no\nfont")

    Sink(BrokenPipeError("it has left")).install(patch)
    patch.setattr(log, "draw_losses", draw)


def test_pictures_and_sinks_that_fail_are_one_warning_each(job, run, tmp_path, monkeypatch,
                                                          capsys):
    """Also while they are opened, and in ranks."""
    options = dict(wandb_log=True, tensorboard=True)
    run(tmp_path / "one", hooks=[failing], **options)
    said = capsys.readouterr().err
    assert [said.count(f"warning: {name}: {error}") for name, error in (
        ("wandb", "BrokenPipeError: it has left"), ("tensorboard", "BrokenPipeError"),
        ("loss.png", "RuntimeError: no font; "))] == [1, 1, 1]
    in_ranks(2, [job(tmp_path / "two", [failing], **options)])
    assert load(tmp_path / "two")["iter_num"] == load(tmp_path / "one")["iter_num"] == 6

    def init(**_):
        raise ValueError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run(tmp_path / "three", wandb_log=True, max_iters=1)
    assert "warning: wandb: ValueError: no API key" in capsys.readouterr().err


def test_sinks_follow_the_log_back(run, tmp_path, monkeypatch):
    """A run that goes on does so under its own name, and steps made again replace their first
    pass; the evaluation that is not made again is there. A new run has none of these."""
    options = dict(wandb_log=True, tensorboard=True, save_interval=3)
    sink = Sink()
    sink.install(monkeypatch)
    run(tmp_path / "a", **options)
    (tmp_path / "a" / "tensorboard").mkdir()
    half = as_killed_at_3(tmp_path / "a", tmp_path / "b")
    del sink.seen[:]
    run(half, init_from="resume", **options)
    wandb, board, again, board_again = sink.opened
    assert wandb["id"] == again["id"] and again["resume"] == "allow"
    assert board_again["purge_step"] == 3 and (half / "tensorboard").exists()
    steps = [step for name, _, step in sink.seen if name == "eval/val_loss"]
    assert steps == [3, 3, 6, 6] and min(step for *_, step in sink.seen) == 3
    run(half, "--overwrite", **options)
    assert sink.opened[-2]["id"] != wandb["id"] and not (half / "tensorboard").exists()


@pytest.mark.parametrize("option, module", [("wandb_log", "wandb"),
                                            ("tensorboard", "torch.utils.tensorboard")])
def test_other_logs_get_the_same_numbers(run, tmp_path, monkeypatch, option, module):
    """Only numbers: a CPU has no mfu, and tensorboard cannot take None. If it is installed."""
    monkeypatch.setitem(sys.modules, module, None)
    refused(lambda: run(tmp_path, f"--{option}"), "pip install", module.split(".")[-1])
    sink = Sink()
    sink.install(monkeypatch)
    seen = sink.seen
    found = run(tmp_path, f"--{option}", template="polyak")
    for name in ("beta", "gamma"):
        means = [(pytest.approx(np.mean(r["scalars"][name])), r["iter"])
                 for r in of_kind(found, "eval")]
        assert means == [row[1:] for row in seen if row[0] == f"scalars/{name}"]
    losses = [(f"{r['type']}/{k}", r[k], r["iter"]) for r in found for k in ("loss", "val_loss")
              if k in r]
    assert losses == [row for row in seen if row[0] in ("train/loss", "eval/val_loss")]
    assert not [row for row in seen if row[0] == "train/mfu"]


@pytest.mark.parametrize("template, names", [
    ("gd", []), ("polyak", ["beta", "gamma"]), ("tmm", ["mu", "beta", "gamma", "nu"]),
    ("imex", ["gamma_a", "gamma_m", "beta"])])
def test_learned_scalars_are_logged_at_evaluations(run, tmp_path, template, names):
    """Mapped, by layer and substep."""
    found = [r for r in run(tmp_path, template=template, learning_rate=0.06) if "scalars" in r]
    assert [r["iter"] for r in found] == ([0, 3, 6] if names else [])
    weights = load(tmp_path)["model"]
    for name in names:
        values = np.array(found[-1]["scalars"][name])
        assert values.shape == (2, 1 if template == "imex" else 2)
        for (layer, k), value in np.ndenumerate(values):
            raw = weights[f"transformer.h.{layer}.steps.{k}.{name}"].double()
            exact = raw.sigmoid() if name in ("mu", "beta") else torch.nn.functional.softplus(raw)
            assert value == pytest.approx(exact.item(), rel=1e-6)
        assert np.abs(values - np.array(found[0]["scalars"][name])).max() > 1e-3  # they learn


def test_scalars_that_only_some_layers_learn_are_left_out():
    for layer in (0, 1):
        gpt = GPT(GPTConfig(block_size=4, vocab_size=9, n_layer=2, n_head=1, n_embd=4,
                            template="polyak"))
        gpt.transformer.h[layer].steps[layer].learn("gate", 0.0, "identity")
        assert learned_scalars(gpt).keys() == {"beta", "gamma"}


def test_a_resumed_runs_clock_goes_on(run, tmp_path):
    """However long the resumed process takes to its first record."""
    before = [r["seconds"] for r in run(tmp_path, max_iters=3)[1:]]
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text().replace(f'"seconds": {before[-1]}', '"seconds": 5000.0'))
    after = [r["seconds"] for r in run(tmp_path, max_iters=5, init_from="resume")[1:]]
    assert after[:len(before)] == [*before[:-1], 5000.0] and 5000 < after[-1] < 5100


def test_progress_fits_a_terminal(monkeypatch):
    """What is longer would leave a line for each step; what is shorter ends in spaces, as not every
    console on Windows knows a code that clears the rest."""
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    terminal.isatty = lambda: True
    show("0123456789")
    show("0123456789", keep=True)
    show("01234")
    monkeypatch.setenv("TERM", "dumb")
    show("which knows no codes")
    assert terminal.getvalue() == \
        "\r012345678\r0123456789\n\r01234    which knows no codes\n"
