"""bench.py compare: the plan, the grid, the statistics, and what is written. Most runs are scripted
logs; one study really trains."""

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import TINY, option_words, refused

import bench
from config import read_config
from support.checkpoint import model_from, read_checkpoint
from support.code import code_in
from tools import compare, findings
from train import TrainConfig

ROOT = Path(__file__).parent.parent
STUDIES = {p.stem: p for p in sorted((ROOT / "config/studies").glob("[a-z]*.py"))}


@pytest.fixture
def study(tmp_path, data_dir, monkeypatch):
    """study(variants, **options) runs bench.py compare, whose cells write logs with the losses of
    `script`: "label-seed1" -> loss, or the reason of a failure. `launched` has their options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "measured_at_the_end", lambda *_: {})

    class Trained:
        """A process of train.py that has ended."""

        def __init__(self, argv, env, stdout, stderr):
            config, _ = read_config(TrainConfig, argv[2:])
            study.launched.append(config)
            name = re.sub(r"-\w+-seed", "-seed", Path(config.out_dir).name)
            loss = study.script.get(name, 1.0)
            assert argv[1] == os.path.join(os.path.dirname(config.out_dir), "code", "train.py")
            self.returncode = 2 if isinstance(loss, str) else 0
            stdout.write(f"error: {loss}\n".encode())
            steps = config.max_iters
            records = [{"type": "eval", "iter": 0, "tokens": 0, "val_loss": 5.0, "seconds": 0.0},
                       {"type": "train", "iter": 0, "tokens": 128, "tokens_per_s": 100.0},
                       {"type": "train", "iter": 1, "tokens": 256, "tokens_per_s": 300.0},
                       {"type": "eval", "iter": 1, "tokens": 128, "val_loss": None,  # not finite
                        "seconds": 1.0},
                       {"type": "eval", "iter": steps, "tokens": steps * 128, "val_loss": loss,
                        "seconds": 2.0, "peak_mb": 50}]
            lines = "\n".join(map(json.dumps, records))
            Path(config.out_dir, "log.jsonl").write_text(lines + "\n")

        def poll(self):
            return self.returncode

    def study(*variants, script=None, **options):
        study.launched, study.script = [], script or {}
        monkeypatch.setattr(compare, "Popen", Trained)
        if not study.pictures:
            monkeypatch.setattr(compare, "draw_study", lambda *_: [])
        words = option_words(**{**TINY, "data_dir": data_dir, "dataset": "tiny", "study": "s",
                                "out_dir": "runs", "results": "found", "seeds": 2, **options})
        bench.main(["compare", *words, "--variants", *variants])
        path = Path("found", options.get("study", "s"), "results.json")
        return json.loads(path.read_text())["runs"]

    study.pictures = False  # they take a second
    return study


def cells(label: str) -> dict[str, str]:
    """The row of this variant in the study's table."""
    lines = [line.strip("|").split("|") for line in
             Path("found/s/table.md").read_text().splitlines() if line.startswith("|")]
    header, row = lines[0], next(line for line in lines if line[0].strip() == label)
    return {name.strip(): cell.strip() for name, cell in zip(header, row, strict=True)}


# -----------------------------------------------------------------------------
# The plan


def plan_of(*variants, **options):
    argv = ["compare", *option_words(**{**TINY, **options}), "--variants", *variants]
    config = bench.read_options(argv)
    return compare.plan(bench.named_variants(argv, config), config, 257)


def test_the_width_that_matches_the_parameters():
    """By hand, over all widths."""
    def parameters(layers, d):
        return layers * (12 * d * d + 2 * d) + (257 + 16) * d + d

    plan = plan_of("a: template=nesterov", "b: template=gd match=parameters",
                   "c: template=gd n_layer=3 match=parameters", "d: template=gd")
    target = compare.model_size(plan["a"])["parameters"]
    for label, layers in (("b", 2), ("c", 3)):
        best = min(range(2, 200, 2), key=lambda d: abs(parameters(layers, d) - target))
        assert (plan[label].n_embd, plan[label].n_layer) == (best, layers)
    assert plan["a"].n_embd == plan["d"].n_embd == 32


def test_what_matches_the_matrices_and_the_flops():
    plan = plan_of("a: ffn=swiglu ffn_hidden=128", "b: ffn=hourglass ffn_depth=2",
                   match="matrices", solve="ffn_hidden")
    assert plan["b"].ffn_hidden == 64  # N = L (4 d d_a + 3 K d d_h)
    assert compare.model_size(plan["b"])["matrices"] == 2 * (4 * 32**2 + 3 * 32 * 128)
    plan = plan_of("a: n_layer=6 n_embd=16", "b: template=imex imex_steps=2 n_embd=16",
                   match="flops", solve="n_layer")
    assert plan["b"].n_layer == 3  # each evaluates twice


def test_widths_that_cannot_be_are_passed_over():
    """Attention of width 16 needs as much of the residual stream."""
    plan = plan_of("a: n_embd=96", "b: head_dim=32 n_embd=64", match="parameters")
    assert 64 <= plan["b"].n_embd < 128


@pytest.mark.parametrize("budget, steps", [("tokens", 60), ("flops", 30), ("seconds", 45)])
def test_budgets(study, monkeypatch, budget, steps):
    """b has twice the layers; a head so small that they are nearly all; it is measured once, at
    three quarters of the speed."""
    asked = []

    def relative_speeds(configs):
        asked.append(list(configs))
        return {"a": 1.0, "b": 0.75, "c": 2.0}

    monkeypatch.setattr(bench, "relative_speeds", relative_speeds)
    size = compare.model_size
    monkeypatch.setattr(compare, "model_size", lambda c: size(c) | {
        "flops_per_token": 10 * c.n_layer})
    options = dict(budget=budget, max_iters=60, seeds=1)
    seconds = budget == "seconds"
    for _ in range(2):
        runs = study("a: n_layer=2", "b: n_layer=4", **options)
        assert [r["steps"] for r in runs] == [60, steps]
    assert asked == ([["a", "b"]] if seconds else [])
    study("a: n_layer=2", "b: n_layer=4", "c: n_layer=1", dry_run=True, **options)
    assert asked[1:] == ([["a", "c"]] if seconds else [])
    runs = study("a: n_layer=2", "b: n_layer=4", "d: n_layer=4 weight_decay=0", **options)
    assert [r["steps"] for r in runs] == [60, steps, steps] and len(asked) == 2 * seconds


def test_seconds_are_measured(study):
    """By bench.py's own speed, on the data's vocabulary: the wider one has fewer steps."""
    small, wide = study("a: n_embd=8", "b: n_embd=256 n_layer=6", budget="seconds", seeds=1,
                        max_iters=1000, repeats=1, steps=1)
    assert small["steps"] == 1000 > wide["steps"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_plan(name, data_dir, monkeypatch, capsys, tmp_path):
    """Its options are train.py's; sizes that were to match do, within two per cent; its docstring
    counts its runs."""
    argv = ["compare", str(STUDIES[name]), f"--data_dir={data_dir}", "--dataset=tiny", "--dry_run",
            f"--out_dir={tmp_path}/out", f"--results={tmp_path}", "--device=cpu"]
    monkeypatch.setattr(bench, "relative_speeds", lambda configs: dict.fromkeys(configs, 1.0))
    config = bench.read_options(argv)
    configs = bench.named_variants(argv, config)
    assert config.study == name
    planned = compare.plan(configs, config, 257)
    sizes = {label: compare.model_size(own) for label, own in planned.items()}
    first = next(iter(sizes.values()))
    for label, own in planned.items():
        if own.match != "width":
            key = compare.SIZES[own.match]
            assert sizes[label][key] == pytest.approx(first[key], rel=0.02)
    bench.main(argv)
    printed = capsys.readouterr().out
    assert all(f"| {label} |" in printed for label in configs)
    assert not list(tmp_path.iterdir())
    text = STUDIES[name].read_text()
    assert f"config/studies/{name}.py" in text
    counted = re.search(r"^Cost: +(\w+) runs", text, re.MULTILINE)[1]
    assert int({"three": 3, "six": 6}.get(counted, counted)) == len(compare.cells_of(planned))


# -----------------------------------------------------------------------------
# The grid


def test_what_is_written(study, capsys):
    script = {f"{label}-seed{seed}": loss for label, losses in (
        ("a", (1.0, 1.01, 1.02)), ("b", (1.1, 1.11, 1.12)), ("c", (0.999, 1.009, 1.019)))
        for seed, loss in enumerate(losses, 1)}
    study.pictures = True
    runs = study("a: template=gd", "b: template=tmm", "c: dropout=0.1", script=script, seeds=3,
                 published="b: 1.234", pairs="c - b", margin=0.03, extended="a seed")
    assert [(r["variant"], r["seed"]) for r in runs] == [(v, s) for v in "abc" for s in (1, 2, 3)]
    assert [r["val_loss"] for r in runs] == list(script.values())
    first = runs[3]
    assert first["options"]["template"] == "tmm" and "seed" not in first["options"]
    assert (first["tokens_per_s"], first["peak_mb"], first["steps"]) == (200, 50, 6)
    assert first["curve"] == [[0, 5.0], [6, 1.1]]
    assert "warning: of fewer than four seeds" in capsys.readouterr().err
    table, a, b = Path("found/s/table.md").read_text(), cells("a"), cells("b")
    assert b["final loss"] == "1.1100 ± 0.0100"
    assert "| b | a | +0.1000 ± 0.0200 | <0.001 | **worse** |" in table  # 2.447 * 0.01 * √(2 / 3)
    assert "| c | a | -0.0010 ± 0.0200 | 0.907 | equal |" in table
    assert "| c | b | -0.1010 ± 0.0200 | <0.001 | **better** |" in table
    assert (a["published best"], b["published best"]) == ("", "1.234")
    assert "in nats per byte" in table and "given beforehand (± 0.03)" in table
    assert "Extended after looking: a seed." in table
    assert all(name in table for name in ("curves.png", "differences.png"))
    assert Path("found/s/differences.png").stat().st_size > 5000
    command = table.splitlines()[2]  # what another one would type
    assert "--n_layer=2 " in command and "'c: dropout=0.1'" in command
    assert not any(word in command for word in ("--out_dir", "--results", "--data_dir", "device"))
    assert str(Path.cwd()) not in Path("found/s/results.json").read_text() + table


def test_the_command_keeps_its_presets(study, monkeypatch):
    """Behind an option, too, that is left out."""
    Path("mine.py").write_text("dropout = 0.1")
    main = bench.main
    monkeypatch.setattr(bench, "main", lambda words: main(
        [words[0], "--jobs=1", "mine.py", "--overwrite", "mine.py", *words[1:]]))
    study("a: template=gd")
    assert "`python bench.py compare mine.py mine.py --" in Path("found/s/table.md").read_text()


def test_it_goes_on_where_it_stopped(study, capsys):
    variants = "a: template=gd", "b: template=tmm"
    refused(lambda: study(*variants, script={"b-seed2": "loss is nan"}),
            "b, seed 2: exit code 2: loss is nan", "the same command tries these again")
    # after half the time there is a table of all variants
    assert [c.template for c in study.launched] == ["gd", "tmm", "gd", "tmm"]
    assert [c.seed for c in study.launched] == [1, 1, 2, 2]
    runs = study(*variants)
    assert [(c.template, c.seed) for c in study.launched] == [("tmm", 2)] and len(runs) == 4
    assert len(study(*variants, seeds=3, log_interval=3)) == 6  # that changes no figure
    assert [c.seed for c in study.launched] == [3, 3] and study.launched[0].log_interval == 3
    study(*variants, seeds=3, tensorboard=True)
    assert study.launched == [] and "0 runs to do, 6 there" in capsys.readouterr().out


def test_how_long_a_run_will_take(study, monkeypatch, capsys):
    """In proportion to its FLOP: as the runs that are there, or of a known card's peak."""
    def said(**options) -> list[str]:
        capsys.readouterr()
        study("a: n_layer=2", "b: n_layer=6", **{"dry_run": True, "dtype": "bfloat16"} | options)
        return [line.split(" | ")[6] for line in capsys.readouterr().out.splitlines()
                if line.startswith(("| a", "| b"))]

    study("a: n_layer=2", dtype="bfloat16")  # two seconds each, says their log
    a, b = said()
    assert a == "0:00:02" < b
    monkeypatch.setattr(compare, "machine", lambda _: "another, torch 2")
    assert said() == ["unknown"] * 2
    monkeypatch.setattr(compare, "peak_flops", lambda _: 1e8)
    a, b = said()
    assert "0:00:40" < a < b
    assert said(dtype="float32") == ["unknown"] * 2


def test_only_some_variants(study):
    study("a: template=gd", "b: template=tmm", only="b")
    assert not Path("found/s/table.md").exists()  # b is compared to a
    runs = study("a: template=gd", "b: template=tmm", only="a")
    assert [r["variant"] for r in runs] == ["a", "a", "b", "b"]
    table = Path("found/s/table.md").read_text()
    assert "only" not in table and "| b |" in table
    study("a: template=gd dropout=0.1", "b: template=polyak", overwrite=True, only="b")
    assert [c.template for c in study.launched] == ["polyak"] * 2
    refused(lambda: study("a: template=gd", only="c"), "only=c", "the variants are ['a']")


def test_seeds(study, capsys):
    """From first_seed on, a variant's own number of them; the table has those asked for, and no
    verdict where some are missing."""
    variants = "a: template=gd seeds=3", "b: template=tmm"
    runs = study(*variants, first_seed=101, script={"b-seed102": "the loss is nan"}, seeds=1)
    assert [(r["variant"], r["seed"]) for r in runs] == [
        ("a", 101), ("a", 102), ("a", 103), ("b", 101)]
    assert [c.seed for c in study.launched] == [101, 101, 102, 103]
    assert (cells("a")["seeds"], cells("b")["seeds"]) == ("3", "1")
    study(*variants, first_seed=102, jobs=0, pairs="a - c")
    assert cells("a")["seeds"] == "2 of 3"
    assert "variants are ['a', 'b']: ['a - c']" in capsys.readouterr().err
    study(*variants, first_seed=101, jobs=0, seeds=2)
    assert (cells("a")["seeds"], cells("b")["seeds"]) == ("3", "1 of 2")
    assert "| seeds are missing |" in Path("found/s/table.md").read_text()


def test_halves_of_the_text(study, monkeypatch):
    """The even blocks report, the odd ones choose; old runs have neither."""
    study("a: template=gd")
    refused(lambda: study("a: template=gd", half="choosing"), "a, seed 1 has no losses by block",
            "--half=both")
    monkeypatch.setattr(compare, "measured_at_the_end", lambda *_: {"blocks": [1.5, 2.5] * 16})
    for half, loss in (("both", "1.0000"), ("reporting", "1.5000"), ("choosing", "2.5000")):
        assert "blocks" in study("a: template=gd", half=half, overwrite=True, study="t")[0]
        table = Path("found/t/table.md").read_text()
        assert f"| a | 2 | {loss} ±" in table
        assert ("of the blocks 1, 3, 5, ... of 32" in table) == (half == "choosing")


def test_changed_options(study):
    """Each set of options has a folder of its own, where its run goes on."""
    study("a: template=gd", "b: template=tmm")
    before = {c.out_dir for c in study.launched}
    refused(lambda: study("a: template=gd", "b: template=polyak"), "has runs of ['b'] with other",
            "--overwrite")
    assert study.launched == []
    runs = study("a: template=gd", "b: template=polyak", overwrite=True)
    assert [c.template for c in study.launched] == ["polyak"] * 2
    assert all(c.init_from == "auto" and c.out_dir not in before for c in study.launched)
    assert [r["options"].get("template", "gd") for r in runs] == ["gd", "gd", "polyak", "polyak"]


@pytest.fixture
def edited(monkeypatch):
    """As if model.py were edited now."""
    return lambda name: monkeypatch.setattr(compare, "code_in", lambda folder=None: {
        "hash": name, "commit": f"commit {name}"} if folder is None else code_in(folder))


def test_runs_of_other_code_are_not_added_to(study, edited):
    """Not the same variants, nor another seed or variant; nor are they runs of another study. Their
    table can be written, and names their commit."""
    variants = "a: template=gd", "b: template=tmm"
    before = study(*variants)
    assert json.loads(Path("found/s/results.json").read_text())["code"] == code_in()
    folders = {c.out_dir for c in study.launched}
    edited("new")
    for options in ({}, {"seeds": 3}, {"only": "b", "seeds": 3}):
        refused(lambda options=options: study(*variants, **options), "has runs of other code",
                code_in()["commit"], "--overwrite", "--study", "--jobs=0")
        assert study.launched == []
    refused(lambda: study("c: template=polyak", only="c"), "other code")
    Path("found/s/table.md").unlink()
    assert study(*variants, jobs=0) == before and study.launched == []
    assert f"code {code_in()['commit']};" in Path("found/s/table.md").read_text()
    assert len(study(*variants, study="t")) == len(study.launched) == 4
    runs = study(*variants, only="b", overwrite=True)
    assert [r["variant"] for r in runs] == ["b", "b"] == [c.out_dir[7:8] for c in study.launched]
    head = json.loads(Path("found/s/results.json").read_text())  # has the measured speeds, too
    assert head["code"]["hash"] == "new"
    assert not folders & {c.out_dir for c in study.launched}


def test_runs_that_do_not_say_their_code(study):
    """They are d42fd40's: as committed, but for other code."""
    runs = study("a: template=gd")
    path = Path("found/s/results.json")
    head = json.loads(path.read_text())
    del head["code"]
    path.write_text(json.dumps(head))
    refused(lambda: study("a: template=gd"), "other code (d42fd40)")
    study("a: template=gd", jobs=0)
    assert "code d42fd40;" in Path("found/s/table.md").read_text()
    assert study("a: template=gd", overwrite=True) == runs


def test_a_study_without_its_pictures(study, monkeypatch, capsys):
    """Whatever matplotlib raises, and names that are not UTF-8: the table is there."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "add_subplot", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which takes all, as that of a program
    study.pictures = True
    study("caf\udce9: template=gd")
    assert "caf\\udce9" in Path("found/s/table.md").read_text()
    assert "warning: no pictures: " in capsys.readouterr().err


def test_other_data(study, data_dir, tmp_path):
    """Without meta.json's sums, too."""
    study("a: template=gd")
    folder = shutil.copytree(data_dir / "easy", tmp_path / "d" / "tiny")
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        del meta[split]["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(lambda: study("a: template=gd", data_dir=tmp_path / "d"), "of other data",
            "another --study")


@pytest.mark.parametrize("variants, options, said", [
    (("a: template=gd", "a: template=tmm"), {}, "two variants have the name a"),
    (("a: template=gd",), {"study": "../x"}, "study=../x"),
    (("a: template=gd",), {"seeds": 0}, "seeds=0"),
    (("a: template=gd",), {"jobs": -1}, "jobs=-1"),
    (("a: template=gd",), {"dataset": "none"}, "none"),
    (("a: template=quick",), {}, "template=quick"),
    (("a: template='gd",), {}, "variant a: No closing quotation"),
    (("",), {}, "not an empty word"),
    (("a: template=gd", "b: template=tmm"), {"pairs": "a"}, 'pairs=a: say "VARIANT - OTHER"'),
    (("a: template=gd",), {"margin": -0.1}, "margin=-0.1"),
    (("a: template=gd",), {"first_seed": -1}, "first_seed=-1"),
    (("a: template=gd", "b: block_size=8"), {}, "b: block_size must be the same in all"),
    (("a: template=gd", "b: eval_tokens=32"), {}, "eval_tokens"),
    (("a: template=gd", "b: dataset=easy"), {}, "dataset"),
    (("a: template=gd", "b: max_iters=3"), {}, "b: max_iters must"),
    (("a: template=gd", "b: init_from=x.pt"), {}, "unknown option init_from"),
    (("a: template=gd",), {"seed": 4}, "unknown option seed"),
    (("a: template=gd", "b: n_embd=128 match=matrices solve=ffn_hidden"), {}, "b: match=matrices"),
    (("a: template=gd", "b: warmup_iters=2 schedule=wsd decay_fraction=0.5 batch_size=8"),
     {"budget": "flops"}, "b: warmup_iters=2")])
def test_what_is_refused(study, variants, options, said):
    refused(lambda: study(*variants, **options), said)
    assert study.launched == [] and not Path("found").exists()


def test_results_that_cannot_be_read_or_written(study):
    """It is known before anything trains."""
    results = Path("found/s/results.json")
    results.parent.mkdir(parents=True)
    results.write_text("<<<<<<< HEAD")
    refused(lambda: study("a: template=gd"), "results.json is damaged")
    assert results.read_text() == "<<<<<<< HEAD"
    refused(lambda: study("a: template=gd", results=results), "results.json")
    assert study.launched == []


def test_shares_of_the_machine(monkeypatch):
    """Cards are dealt out, unless the device names one; cores are divided."""
    monkeypatch.setattr(compare, "pick_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def shares(visible="", count=4, **options):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return [(share.get("CUDA_VISIBLE_DEVICES"), int(share["OMP_NUM_THREADS"]))
                for share in compare.shares_of(compare.CompareConfig(**options))]

    assert shares() == [("0", 2), ("1", 2), ("2", 2), ("3", 2)]
    assert shares("GPU-a,GPU-b", jobs=3) == [("GPU-a", 2), ("GPU-b", 2), ("GPU-a", 2)]
    assert shares("2,-1,3", count=1) == [("2", 8)]  # CUDA itself stops at what is no card
    assert shares(device="cuda:1") == [(None, 8)]
    assert shares(device="cpu", jobs=2) == [(None, 4), (None, 4)]


def test_a_signal_stops_the_runs(study, monkeypatch):
    """SIGTERM goes on to those that run, and the command waits until they have saved."""
    endless, before = MagicMock(), signal.getsignal(signal.SIGTERM)
    endless.poll.side_effect = lambda: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(compare.Cell, "start", lambda *_: endless)
    try:
        with pytest.raises(KeyboardInterrupt):
            study("a: template=gd")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [call[0] for call in endless.method_calls] == ["poll", "terminate", "wait"]


def test_a_study_that_trains(words, tmp_path, data_dir, run, monkeypatch, capsys, edited):
    """Two variants, two at a time, in processes of their own. Anyone who runs a cell's options with
    train.py gets its figure; a cell that was cut off goes on from its checkpoint, with its code,
    whatever became of that meanwhile."""
    monkeypatch.chdir(tmp_path)
    argv = ["compare", *words("runs"), "--study=s", "--seeds=1", "--jobs=2", "--results=found",
            "--variants", "gd: template=gd", "tmm: template=tmm"]
    bench.main([*argv, "--dry_run"])
    assert not list(tmp_path.iterdir())
    bench.main(argv)
    printed = capsys.readouterr().out
    assert "2 at a time" in printed and "2 runs to do, 0 there" in printed
    path = tmp_path / "found/s/results.json"
    stored = json.loads(path.read_text())
    gd, tmm = runs = stored["runs"]
    assert all(r["peak_mb"] > 50 and r["tokens_per_s"] > 0 for r in runs)
    assert [step for step, _ in gd["curve"]] == [0, 3, 6]
    assert len(gd["blocks"]) == 18  # windows
    assert statistics.mean(gd["blocks"]) == pytest.approx(gd["val_loss"], abs=1e-5)
    (ckpt,) = (tmp_path / "runs/s").glob("gd-*-seed1/ckpt.pt")
    ids = torch.from_numpy(np.fromfile(data_dir / "tiny" / "val.bin", "<u2").astype("int64"))
    by_hand = model_from(read_checkpoint(str(ckpt))).eval()(ids[None, 48:64], ids[None, 49:65])[1]
    assert gd["blocks"][3] == pytest.approx(by_hand.item(), abs=1e-5)
    assert gd["substeps"] == {} and set(tmm["substeps"]) == {"memory", "cosine"}
    assert "scalars.png" in (tmp_path / "found/s/table.md").read_text()
    records = run(tmp_path / "again", seed=1, **tmm["options"] | {"data_dir": data_dir})
    assert records[-1]["val_loss"] == pytest.approx(tmm["val_loss"], abs=6e-6)
    stored["runs"] = [gd]
    path.write_text(json.dumps(stored))
    edited("new")
    refused(lambda: bench.main(argv), "other code")
    done = subprocess.run([sys.executable, "runs/s/code/bench.py", *argv], capture_output=True,
                          text=True)
    assert "1 runs to do, 1 there" in done.stdout and done.returncode == 0, done.stderr
    (output,) = (tmp_path / "runs/s").glob("tmm-*-seed1/output.txt")
    assert "resuming" in output.read_text()
    assert [r["val_loss"] for r in json.loads(path.read_text())["runs"]] == [
        gd["val_loss"], tmm["val_loss"]]


# -----------------------------------------------------------------------------
# The papers' tables, from the download to the last line, scaled down


@pytest.mark.torture
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_reproduce(tmp_path):
    """The lines of the Makefile, with small options and a text of our own."""
    stories = "\n".join(f"Once upon a time there were {n} cats.\n<|endoftext|>" for n in range(900))
    (tmp_path / "stories.txt").write_text(stories)
    scale = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
             "--gradient_accumulation_steps=1", "--max_iters=4", "--warmup_iters=1",
             "--eval_interval=2", "--save_interval=2", "--eval_tokens=64", "--device=cpu",
             f"--results={tmp_path}/results", f"--out_dir={tmp_path}/out",
             "--only", "gd (GPT)", "nesterov (YuriiFormer)"]
    prepare = [f"--input={tmp_path}/stories.txt", "--tokenizer=bytes", "--val_fraction=0.1"]
    lines = subprocess.run(
        ["make", "-n", "reproduce-tinystories", "PREPARE=" + shlex.join(prepare),
         "COMPARE=" + shlex.join(scale)], cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    lines = [line for line in lines if re.match(r"\.venv/bin/python \w+\.py ", line)]
    assert [shlex.split(line)[1] for line in lines] == ["prepare.py", "bench.py"]
    for line in lines:
        argv = [sys.executable, *shlex.split(line)[1:], f"--data_dir={tmp_path}/data"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "results/paper_tinystories/table.md").read_text()
    assert "published best" in table and "nesterov (YuriiFormer)" in table
    assert math.isfinite(float(table.split("| gd (GPT) | 1 | ")[1].split(" ")[0]))


# -----------------------------------------------------------------------------
# The committed results


RESULTS = sorted(path.parent for path in (ROOT / "docs/results").glob("*/results.json"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_committed_results(folder, data_dir, tmp_path):
    """They are of the presets as these are now, and the table is that of the runs."""
    preset = STUDIES[folder.name]
    argv = ["compare", str(preset), f"--data_dir={data_dir}"]
    config = bench.read_options(argv)
    head = json.loads((folder / "results.json").read_text())
    runs = head["runs"]
    rows = {"shakespeare_char": 65, "tinystories_bytes": 257}[head["data"]["dataset"]]
    planned = compare.plan(bench.named_variants(argv, config), config, rows)
    free = {"max_iters"} if config.budget != "tokens" else set()
    for run in runs:
        options = compare.options_of(planned[run["variant"]])
        assert {k: v for k, v in options.items() if k not in free} == {
            k: v for k, v in run["options"].items() if k not in free}
    table = (folder / "table.md").read_text()
    runs = [compare.of_half(run, config.half) for run in runs]
    assert findings.markdown(findings.summary(runs, planned)) in table
    found = findings.comparisons(runs, planned)
    assert findings.markdown(findings.differences(found)) in table
    for name in set(re.findall(r"\]\((\w+\.png)\)", table)):
        assert (folder / name).stat().st_size < 400_000
    assert not re.search(r"(/work|/home|/tmp|/root)", table + (folder / "results.json").read_text())


def test_the_page_says_what_the_tables_say():
    """Every figure with its spread, and every verdict beside one."""
    page = (ROOT / "docs/results/README.md").read_text()
    tables = "\n".join(p.read_text() for p in (ROOT / "docs/results").glob("*/table.md"))
    figures = set(re.findall(r"[+-]?\d\.\d{4} ± \d\.\d{4}", page))
    assert figures and not {f for f in figures if f not in tables}
