"""Runs that are stopped and resumed, that several processes share (DDP and FSDP2 over gloo), and
whose numbers go bad.

Ranks are forked processes (processes.py), which make one run after the other. What a test does to
the trainer is a hook: it takes a MonkeyPatch, here or in the ranks.
"""

import itertools
import json
import math
import os
import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_data
from processes import run_ranks, start_ranks
from test_train import (
    HOURGLASS,
    assert_same,
    largest_difference,
    load,
    of_kind,
    refused,
    without_times,
)
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

import sample
import train
from model import GPT, TEMPLATES, GPTConfig
from support.checkpoint import read_shards
from support.meta import load_meta

torture = partial(pytest.param, marks=pytest.mark.torture)
YURII = dict(template="nesterov")
OPTIMIZERS = ("adamw", "muon")
# windows of `count`, whose tokens say where they are: 12 a step, 20 an epoch
SHARED = dict(dataset="count", batch_size=2, gradient_accumulation_steps=6)


# -----------------------------------------------------------------------------
# Runs in this process and in ranks


@pytest.fixture
def alone(run):
    """alone(out, *hooks, **options): a run in this process; its records."""
    def go(out, *hooks, **options):
        with pytest.MonkeyPatch.context() as patch:
            for hook in hooks:
                hook(patch)
            return run(out, **options)

    return go


@pytest.fixture
def job(words):
    """job(out, *hooks, **options): a run for ranks."""
    return lambda out, *hooks, **options: (words(out, **options), hooks)


def several(jobs, ports) -> None:
    """The hook of ranks: main makes all these runs."""
    def main(_, once=train.main):
        for (argv, hooks), port in zip(jobs, ports, strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MASTER_PORT", port)
                for hook in hooks:
                    hook(patch)
                print("\0", flush=True)
                once(argv)

    train.main = main


def hook_of(jobs):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in jobs]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return partial(several, jobs, ports)


def ranks(world, *jobs) -> list[str]:
    """Make these runs in `world` processes, to a good end; what rank 0 prints in each."""
    return run_ranks([], world, hook_of(jobs)).split("\0")[1:]


def broken(world, *jobs) -> list[str]:
    """Runs of which the last ends every rank with code 2; what each rank printed in it."""
    programs = start_ranks([], world, hook_of(jobs))
    assert [p.wait() for p in programs] == [2] * world, [p.output for p in programs]
    return [p.output.split("\0")[-1] for p in programs]


def records(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses(out) -> np.ndarray:
    return np.array([[r["loss"], r["grad_norm"]] for r in of_kind(records(out), "train")])


def tensors(out, name="ckpt.pt") -> dict:
    """A checkpoint's, wherever they are: model/parameter and optimiser/parameter/state."""
    checkpoint = load(out, name)
    if "shards" in checkpoint:
        folder = str(Path(out, checkpoint["shards"]))
        return {f"{kind}/{n}": t for kind in ("model", *OPTIMIZERS)
                for n, t in read_shards(folder, kind).items()}
    weights = {f"model/{n}": w for n, w in checkpoint["model"].items() if n != "lm_head.weight"}
    return weights | {f"{kind}/{n}/{key}": t for kind, named in checkpoint["optimizer"].items()
                      for n, state in named.items() for key, t in state.items()}


def assert_same_end(ours, theirs) -> None:
    """Records, tensors, generators, position: all but times and names of folders."""
    assert without_times(records(ours)) == without_times(records(theirs))
    assert_same(tensors(ours), tensors(theirs))
    ours, theirs = load(ours), load(theirs)
    for checkpoint in (ours, theirs):
        for name in ("config", "log_length", "model", "optimizer", "shards"):
            checkpoint.pop(name, None)
    assert_same(ours, theirs)


def as_killed_at_3(whole, half):
    """A copy of a run of 6 steps, saved every 3, as if killed before its last save."""
    assert load(whole, "ckpt_prev.pt")["iter_num"] == 3
    shutil.copytree(whole, half)
    for name in ("ckpt.pt", "best.pt"):
        (half / name).unlink(missing_ok=True)
    (half / "ckpt_prev.pt").rename(half / "ckpt.pt")
    return half


# -----------------------------------------------------------------------------
# Hooks


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def the_step(patch) -> list[int]:
    """A list whose only entry is the step that the run is in."""
    now = [0]

    def multiplier(step, config, wrapped=train.lr_multiplier):
        now[0] = step
        return wrapped(step, config)

    patch.setattr(train, "lr_multiplier", multiplier)
    return now


def stop_after(step, patch) -> None:
    """A signal comes in the step before."""
    def multiplier(now, config, wrapped=train.lr_multiplier):
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return wrapped(now, config)

    patch.setattr(train, "lr_multiplier", multiplier)


def record_windows(folder, patch) -> None:
    """folder/RANK gets the first token of every window that this rank trains on."""
    folder.mkdir(exist_ok=True)

    def to_device(rows, device, wrapped=train.to_device):
        if torch.is_grad_enabled():
            with open(folder / str(rank()), "a") as file:
                file.writelines(f"{first}\n" for first in rows[:, 0].tolist())
        return wrapped(rows, device)

    patch.setattr(train, "to_device", to_device)


def windows(folder, steps) -> list[np.ndarray]:
    """What record_windows wrote: per rank (steps, windows of a step)."""
    return [np.loadtxt(path, dtype=int).reshape(steps, -1) for path in sorted(folder.iterdir())]


def spoil(steps, patch, where=None, loss=1.0, gradient=1.0) -> None:
    """In these steps, on rank `where` (None: on all), multiply the loss or only its gradient."""
    now = the_step(patch)

    def forward(self, *args, wrapped=GPT.forward, **kwargs):
        logits, value = wrapped(self, *args, **kwargs)
        if torch.is_grad_enabled() and now[0] in steps and where in (None, rank()):
            value = value * loss
            value.register_hook(lambda g: g * gradient)
        return logits, value

    patch.setattr(GPT, "forward", forward)


def sharded_gradients(patch) -> None:
    """Between micro-batches, too, a rank has only its part of every gradient."""
    def accumulate(model, batches, *rest, wrapped=train.accumulate):
        def watched():
            for n, batch in enumerate(batches):
                grads = [p.grad for p in model.parameters()]
                assert all(isinstance(g, DTensor) if n else g is None for g in grads)
                yield batch

        return wrapped(model, watched(), *rest)

    patch.setattr(train, "accumulate", accumulate)


def overflow_shard(steps, where, kind, patch) -> None:
    """In these steps one number of this optimiser's gradients is inf, in rank `where`'s part."""
    now = the_step(patch)

    def unscale_(self, optimizer, wrapped=GradScaler.unscale_):
        if now[0] in steps and rank() == where and type(optimizer).__name__.lower() == kind:
            grads = (p.grad for g in optimizer.param_groups for p in g["params"])
            parts = (g.to_local() if isinstance(g, DTensor) else g for g in grads)
            next(part for part in parts if part.numel()).view(-1)[0] = math.inf
        return wrapped(self, optimizer)

    patch.setattr(GradScaler, "unscale_", unscale_)


def leave_out(steps, patch) -> None:
    """No update in these steps."""
    now = the_step(patch)

    def step(self, optimizer, wrapped=GradScaler.step):
        return None if now[0] in steps else wrapped(self, optimizer)

    patch.setattr(GradScaler, "step", step)


def scripted(values, patch) -> None:
    """evaluate() gives these, one after the other."""
    values = list(values)
    patch.setattr(train, "evaluate", lambda *_: values.pop(0))


def log_scale(file, patch) -> None:
    """Write this rank's loss scale after every step."""
    def update(self, *args, wrapped=GradScaler.update):
        wrapped(self, *args)
        with open(f"{file}-{rank()}", "a") as out:
            out.write(f"{self.get_scale()}\n")

    patch.setattr(GradScaler, "update", update)


def scales(file, of=0) -> list[float]:
    return [float(line) for line in Path(f"{file}-{of}").read_text().splitlines()]


# -----------------------------------------------------------------------------
# Exact continuation


def test_stopped_at_any_step_and_resumed(alone, tmp_path):
    """By a signal, also where an evaluation or a save is due; in the midst of epochs."""
    options = dict(YURII, optimizer="muon", dropout=0.1, max_iters=6, eval_interval=2,
                   save_interval=3, dataset="count")
    whole = tmp_path / "whole"
    alone(whole, partial(record_windows, tmp_path / "w-whole"), **options)
    for step in range(1, 6):
        half, read = tmp_path / f"{step}", partial(record_windows, tmp_path / f"w-{step}")
        alone(half, read, partial(stop_after, step), **options)
        assert load(half)["iter_num"] == step
        alone(half, read, init_from="resume", **options)
        assert_same_end(half, whole)
        (ours,), (theirs,) = windows(tmp_path / f"w-{step}", 6), windows(tmp_path / "w-whole", 6)
        assert (ours == theirs).all(), step


@pytest.mark.parametrize("optimizer, dataset", [
    ("adamw", "tiny"), ("muon", "edge"), torture("adamw", "edge"), torture("muon", "tiny")])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_resumes_bit_for_bit(alone, tmp_path, template, optimizer, dataset):
    """In the midst of the second epoch, or where it begins."""
    options = dict(template=template, optimizer=optimizer, dataset=dataset, dropout=0.2,
                   save_interval=3)
    alone(tmp_path / "whole", **options)
    half = as_killed_at_3(tmp_path / "whole", tmp_path / "half")
    alone(half, init_from="resume", **options)
    assert_same_end(half, tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", torture("float16")])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_resume_bit_for_bit(job, tmp_path, parallel, dtype):
    variants = {f"{optimizer}-{dataset}": dict(
        YURII, optimizer=optimizer, dataset=dataset, dropout=0.2, save_interval=3,
        parallel=parallel, dtype=dtype) for optimizer, dataset in (("adamw", "tiny"),
                                                                   ("muon", "edge"))}
    ranks(2, *(job(tmp_path / name, **options) for name, options in variants.items()))
    halves = {name: as_killed_at_3(tmp_path / name, tmp_path / f"{name}-half") for name in variants}
    ranks(2, *(job(halves[name], init_from="resume", **options)
               for name, options in variants.items()))
    for name in variants:
        assert_same_end(halves[name], tmp_path / name)
        first, second = load(tmp_path / name)["rng"]
        assert not torch.equal(first["cpu"], second["cpu"])


@pytest.mark.parametrize("state, scales_seen", [
    (dict(scale=2.0**40), {3: 2.0**39, 4: 2.0**38, 5: 2.0**37}),  # overflowing
    (dict(scale=2.0**10, growth=1998), {3: 2.0**10, 4: 2.0**11, 5: 2.0**11}),  # about to grow
], ids=["overflowing", "growing"])
def test_the_scaler_resumes(alone, tmp_path, state, scales_seen):
    """From any step before, at or after a change of the scale."""
    options = dict(optimizer="muon", dtype="float16", dropout=0.1)
    start = tmp_path / "start"
    alone(start, max_iters=3, lr_decay_iters=6, **options)
    checkpoint = load(start)
    checkpoint["scaler"] |= {"scale": state["scale"], "_growth_tracker": state.get("growth", 0)}
    torch.save(checkpoint, start / "ckpt.pt")
    whole = shutil.copytree(start, tmp_path / "whole")
    alone(whole, partial(log_scale, tmp_path / "scale"), init_from="resume", **options)
    assert dict(enumerate(scales(tmp_path / "scale"), 3)) == scales_seen
    for step in (4, 5):
        half = shutil.copytree(start, tmp_path / f"{step}")
        alone(half, partial(stop_after, step), init_from="resume", **options)
        assert load(half)["scaler"]["scale"] == scales_seen[step - 1]
        alone(half, init_from="resume", **options)
        assert_same_end(half, whole)
    if state["scale"] == 2.0**40:  # nothing but the scale has moved
        assert_same(tensors(whole), tensors(start))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_count_of_steps_left_out_resumes(alone, tmp_path, capsys, optimizer):
    options = dict(YURII, optimizer=optimizer, nan="skip", dropout=0.1, save_interval=3)
    hook = partial(spoil, (1, 2, 4), loss=math.nan)
    alone(tmp_path / "whole", hook, **options)
    half = as_killed_at_3(tmp_path / "whole", tmp_path / "half")
    assert load(half)["skipped"] == 2
    capsys.readouterr()
    alone(half, hook, init_from="resume", **options)
    assert "done: 6 steps, 3 left out" in capsys.readouterr().out
    assert [(r["iter"], r["skipped"]) for r in of_kind(records(half), "skip")] == [
        (1, 1), (2, 2), (4, 3)]
    assert load(half)["skipped"] == 3
    assert_same_end(half, tmp_path / "whole")


def test_weights_that_are_broken_are_not_saved(alone, tmp_path, capsys):
    """Steps 3 to 17 are left out: the saves of 6 and 9 are made, those of 15 and 18 are not."""
    hook = partial(spoil, tuple(range(3, 18)), loss=math.nan)
    options = dict(YURII, nan="skip", save_interval=3, eval_interval=100)
    alone(tmp_path, hook, max_iters=18, **options)
    assert "15 left out; the last good checkpoint, of step 12" in capsys.readouterr().out
    assert load(tmp_path)["iter_num"] == 12
    hook = partial(spoil, tuple(range(12, 9999)), loss=math.nan)
    (line,) = refused(lambda: alone(tmp_path, hook, init_from="resume", max_iters=9999, **options),
                      "the last 1000 steps", "step 21")
    assert load(tmp_path)["iter_num"] == 21


@pytest.mark.parametrize("worlds", [(0, 2), torture((1, 3))], ids=str)
def test_resuming_with_another_number_of_processes(alone, job, tmp_path, capsys, worlds):
    """And another micro-batch, or sharded where it was not and the reverse: the same data in the
    same steps, the same losses, and a word about the generators."""
    options = dict(YURII, **SHARED, dtype="float64", save_interval=3)
    ddp, fsdp = dict(parallel="ddp"), dict(parallel="fsdp")
    one, two, sharded = (tmp_path / name for name in ("one", "two", "sharded"))
    alone(one, partial(record_windows, tmp_path / "w-one"), **options)
    ranks(2, job(two, **ddp, **options), job(sharded, **fsdp, **options))
    expected = np.sort(windows(tmp_path / "w-one", 6)[0])
    assert (expected == np.sort(np.reshape(train.WindowOrder(343, 16, 1337).starts(0, 72),
                                           (6, 12)))).all()
    plans = {  # world (0: without torchrun) -> where from, how to go on, does it warn
        0: [(two, {}, True), (sharded, {}, True),
            (one, dict(batch_size=4, gradient_accumulation_steps=3), False)],
        1: [(two, ddp, True), (sharded, fsdp, True), (one, fsdp, False)],
        2: [(one, ddp, True), (one, fsdp, True), (two, fsdp, False), (sharded, ddp, False)],
        3: [(two, ddp, True), (sharded, fsdp, True),
            (two, dict(batch_size=1, gradient_accumulation_steps=12), True)]}
    for world, plan in ((world, plans[world]) for world in worlds):
        names = [f"{i}-on-{world}" for i in range(len(plan))]
        for name, (source, _, _) in zip(names, plan, strict=True):
            as_killed_at_3(source, tmp_path / name)
        runs = [(tmp_path / name, partial(record_windows, tmp_path / f"w-{name}"),
                 options | dict(how, init_from="resume"))
                for name, (_, how, _) in zip(names, plan, strict=True)]
        if world:
            said = ranks(world, *(job(out, hook, **how) for out, hook, how in runs))
        else:
            said = []
            for out, hook, how in runs:
                capsys.readouterr()
                alone(out, hook, **how)
                said.append(capsys.readouterr().out)
        for name, (source, how, warned), words in zip(names, plan, said, strict=True):
            where = (name, source.name, how)
            read = np.sort(np.concatenate(windows(tmp_path / f"w-{name}", 3), axis=1))
            assert (read == expected[3:]).all(), where
            assert np.abs(losses(tmp_path / name) - losses(one)).max() < 1e-10, where
            difference = largest_difference(tensors(tmp_path / name), tensors(one))
            assert difference < 1e-10, where
            assert ("dropout restarts from the seed" in words) == warned, where
            print(*where, difference)


# -----------------------------------------------------------------------------
# Several processes are one


VARIANTS = {"gpt": dict(bias=True), "yuriiformer": YURII,
            "hourglass": HOURGLASS, "hourglass-yurii": dict(HOURGLASS, **YURII)}


def gradients(out) -> dict:
    """Of the first step, up to a factor: the first moments."""
    return {n: t for n, t in tensors(out).items() if n.endswith(("/exp_avg", "/momentum_buffer"))}


def relative(ours: dict, theirs: dict) -> dict:
    """name -> the largest difference, as a share of the largest entry."""
    assert ours.keys() == theirs.keys()
    return {n: ((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item() for n in theirs}


@pytest.mark.parametrize("variant, kinds", [
    *((variant, ("float64", "first")) for variant in VARIANTS if variant != "hourglass-yurii"),
    torture("hourglass-yurii", ("float64", "first")),
    *(torture(variant, ("float32",)) for variant in VARIANTS)])
def test_two_processes_equal_one(alone, job, tmp_path, variant, kinds):
    """Losses and weights of 20 steps, the gradient of the first; and they share out the windows."""
    options = dict(SHARED, gradient_accumulation_steps=4, eval_interval=10, **VARIANTS[variant])
    hows = {"float64": dict(dtype="float64", max_iters=20), "float32": dict(max_iters=20),
            "first": dict(max_iters=1, grad_clip=0)}
    runs = {f"{optimizer}-{kind}": dict(hows[kind], optimizer=optimizer, **options)
            for optimizer in OPTIMIZERS for kind in kinds}
    record = partial(record_windows, tmp_path / "windows")
    ranks(2, *(job(tmp_path / name / "two", *([] if i else [record]), **how)
               for i, (name, how) in enumerate(runs.items())))
    for name, how in runs.items():
        alone(tmp_path / name / "one", **how)
    worst = {}
    for name in runs:
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        ours, theirs = ([(r["type"], r.get("iter")) for r in records(out)] for out in (one, two))
        assert ours == theirs
        assert load(one)["tokens_seen"] == load(two)["tokens_seen"]
        if name.endswith("first"):
            worst[name] = max(relative(gradients(two), gradients(one)).values())
        else:
            worst[name] = np.abs(losses(two) - losses(one))[:, 0].max()
            evals = [[r["val_loss"] for r in of_kind(records(out), "eval")] for out in (one, two)]
            worst[f"{name}-eval"] = np.abs(np.subtract(*evals)).max()
        if name.endswith("float64"):
            worst[f"{name}-weights"] = largest_difference(tensors(two), tensors(one))
    print(variant, json.dumps(worst, indent=1))
    bounds = {"float64": 1e-12, "float32": 1e-5, "first": 1e-6}
    muon = {"float64": 1e-12, "float32": 1e-3, "first": 1e-6}
    assert not {name: value for name, value in worst.items() if not value <= (
        muon if name.startswith("muon") else bounds)[name.split("-")[1]]}

    first, second = windows(tmp_path / "windows", 20)
    assert first.shape == second.shape == (20, 4)
    assert not any(set(a) & set(b) for a, b in zip(first, second, strict=True))
    together = np.concatenate((first, second), axis=1).flatten().tolist()
    order = train.WindowOrder(343, 16, 1337)
    for first in range(0, 160, 40):  # five steps of 8 windows are two epochs of 20
        assert sorted(together[first:first + 40]) == sorted(order.starts(first, 40))


def test_evaluation_of_windows_that_are_a_batch_each(tmp_path):
    """Three of them over two processes: the dummy that the second one gets changes nothing."""
    T, cpu = 2304, torch.device("cpu")
    folder = write_data(tmp_path / "long", np.arange(3 * T + 1) % 257)
    tokens = train.Tokens(folder, "val", load_meta(folder), T)
    model = GPT(GPTConfig(block_size=T, vocab_size=257, n_layer=1, n_head=1, n_embd=8)).double()
    one, *two = (train.evaluate(model, tokens, 3 * T, SimpleNamespace(
        rank=rank, world=world, device=cpu, sum=lambda sums: sums), torch.float64)
        for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert sum(two) == pytest.approx(one, rel=1e-12) and 0 < two[1] < two[0] < one


@pytest.mark.parametrize("dtype, worlds", [
    ("float32", (0, 2)), torture("float32", (0, 1, 2, 3)), torture("bfloat16", (0, 1, 2, 3))])
def test_evaluation_is_the_same_number_everywhere(alone, job, tmp_path, data_dir, dtype, worlds):
    """530 windows of 562: three batches, of which the last is not full."""
    if not (data_dir / "uneven").exists():
        rng = np.random.default_rng(2)
        write_data(data_dir / "uneven", rng.integers(256, size=343), rng.integers(256, size=9005))
    alone(tmp_path / "trained", **YURII, max_iters=3)
    options = dict(YURII, dataset="uneven", eval_tokens=530 * 16 + 3, max_iters=1, dtype=dtype,
                   init_from=tmp_path / "trained" / "ckpt.pt", gradient_accumulation_steps=6)
    seen = {}
    sizes = {0: (1, 2, 4), 1: (2,), 2: (1, 4), 3: (2,)}
    for world in worlds:
        hows = [dict(batch_size=b) for b in sizes[world]]
        hows += [dict(parallel="fsdp")] if world == 2 else []
        names = [f"{world}-{i}" for i in range(len(hows))]
        if world:
            ranks(world, *(job(tmp_path / name, **options | how)
                           for name, how in zip(names, hows, strict=True)))
        for name, how in zip(names, hows, strict=True):
            if not world:
                alone(tmp_path / name, **options | how)
            seen[name] = of_kind(records(tmp_path / name), "eval")[0]["val_loss"]
    assert len(set(seen.values())) == 1, seen


# -----------------------------------------------------------------------------
# FSDP2 and activation checkpointing


@pytest.mark.parametrize("variant, steps, kinds", [
    ("yuriiformer", 5, [("adamw", "float64"), ("muon", "float32")]),
    *(torture(variant, 20, list(itertools.product(OPTIMIZERS, ("float64", "float32"))))
      for variant in ("yuriiformer", "hourglass"))])
def test_sharded_equals_copied(job, tmp_path, variant, steps, kinds):
    """With accumulation, with and without activation checkpointing; and model.pt is the shards'."""
    options = dict(SHARED, gradient_accumulation_steps=4, max_iters=steps, eval_interval=10,
                   **VARIANTS[variant])
    ways = {"ddp": {}, "fsdp": dict(parallel="fsdp"),
            "recomputed": dict(parallel="fsdp", activation_checkpointing=True)}
    bounds = {("adamw", "float64"): 1e-12, ("adamw", "float32"): 1e-5,
              ("muon", "float64"): 1e-3, ("muon", "float32"): 1e-3}  # it sums shards in bf16
    ranks(2, *(job(tmp_path / f"{o}-{d}-{name}", *([sharded_gradients] if how else []),
                   optimizer=o, dtype=d, **how, **options)
               for o, d in kinds for name, how in ways.items()))
    worst = {}
    for o, d in kinds:
        bound = bounds[o, d]
        copied = tmp_path / f"{o}-{d}-ddp"
        for name in ("fsdp", "recomputed"):
            sharded = tmp_path / f"{o}-{d}-{name}"
            worst[sharded.name] = np.abs(losses(sharded) - losses(copied))[:, 0].max(), bound
            if bound == 1e-12:
                worst[f"{sharded.name}-tensors"] = largest_difference(
                    tensors(sharded), tensors(copied)), bound
            whole = load(sharded, "model.pt")["model"]
            theirs = {f"model/{n}": w for n, w in whole.items() if n != "lm_head.weight"}
            shards = tensors(sharded)
            assert_same(theirs, {n: t for n, t in shards.items() if n.startswith("model/")})
    print(json.dumps(worst, indent=1))
    assert not {name: pair for name, pair in worst.items() if not pair[0] <= pair[1]}


def test_checkpoints_of_a_sharded_run(job, alone, run, tmp_path, capsys):
    """Latest, previous, best; folders that none of them names vanish; what a killed save left too;
    a damaged one falls back on the one before; every file is one to start or to sample from."""
    out, copied = tmp_path / "out", tmp_path / "copied"
    options = dict(YURII, max_iters=5, eval_interval=1, save_interval=1)
    found = partial(scripted, (5.0, 4.0, 3.0, 4.0, 5.0, 6.0))
    ranks(2, job(out, found, parallel="fsdp", **options), job(copied, found, **options))

    def folders():
        named = {name: load(out, name)["shards"] for name in ("ckpt.pt", "ckpt_prev.pt", "best.pt")}
        assert {p.name for p in out.glob("shards-*")} == set(named.values())
        assert not list(out.glob("*.partial"))
        return named

    before = folders()
    assert before == {"ckpt.pt": "shards-5", "ckpt_prev.pt": "shards-4", "best.pt": "shards-2"}
    for name, step in (("ckpt.pt", 5), ("ckpt_prev.pt", 4), ("best.pt", 2)):
        assert load(out, name)["iter_num"] == load(copied, name)["iter_num"] == step
        assert largest_difference(tensors(out, name), tensors(copied, name)) < 1e-6
        alone(tmp_path / f"from-{name}", init_from=out / name, max_iters=1, **YURII)

    shutil.copytree(out / "shards-4", out / "shards-3")  # a save that was killed
    part = sorted((out / "shards-5").glob("*.distcp"))[0]
    part.write_bytes(part.read_bytes()[:-100])
    (said,) = ranks(2, job(out, partial(scripted, (3.5,)), init_from="resume", parallel="fsdp",
                           **options))
    assert "shards-5" in said and "damaged" in said and "ckpt_prev.pt" in said
    assert load(out)["iter_num"] == 5
    folders()
    assert largest_difference(tensors(out), tensors(copied)) < 1e-6

    alone(tmp_path / "new", init_from=out / "model.pt", max_iters=1, learning_rate=0.0, **YURII)
    weights = dict(load(tmp_path / "new")["model"])
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])  # tied
    assert_same(weights, dict(load(out, "model.pt")["model"]))
    texts = []
    for source in (f"--init_from={out}/model.pt", f"--out_dir={out}"):
        capsys.readouterr()
        sample.main([source, "--start=a", "--max_new_tokens=20", "--num_samples=2",
                     "--device=cpu", "--dtype=float32"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 20

    ranks(2, job(out, overwrite=True, parallel="fsdp", **options | dict(max_iters=1)))
    assert {path.name for path in out.glob("shards-*")} == {load(out)["shards"]}


def test_a_sharded_run_that_goes_on_otherwise_leaves_nothing_stale(alone, job, tmp_path):
    """If there is a model.pt it is the weights at the end, and no old shards stay behind."""
    ranks(2, job(tmp_path, parallel="fsdp", max_iters=3))
    alone(tmp_path, init_from="resume", max_iters=12, save_interval=3)
    assert not list(tmp_path.glob("shards-*")) or load(tmp_path, "best.pt")["shards"]
    if (tmp_path / "model.pt").exists():
        weights, latest = (load(tmp_path, name)["model"] for name in ("model.pt", "ckpt.pt"))
        assert_same(dict(weights), {n: latest[n] for n in weights})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_overflow_on_one_rank_is_everyones(job, tmp_path, parallel):
    """Of one optimiser's gradients, in one number: no optimiser moves on any rank, the scale halves
    on both."""
    options = dict(YURII, dtype="float16", optimizer="muon", parallel=parallel, save_interval=1)
    cases = {f"{kind}-{where}": partial(overflow_shard, (2,), where, kind)
             for kind, where in (("adamw", 0), ("muon", 1))}
    if parallel == "ddp":  # after the gradients are averaged, they are the same everywhere
        cases = {"natural": partial(spoil, (2,), where=1, gradient=math.inf)}
    ranks(2, *(job(tmp_path / name, hook, partial(log_scale, tmp_path / f"scale-{name}"),
                   partial(stop_after, 3), **options) for name, hook in cases.items()))
    for name in cases:
        out = tmp_path / name
        assert scales(tmp_path / f"scale-{name}") == [65536.0, 65536.0, 32768.0], name
        assert scales(tmp_path / f"scale-{name}", 1) == [65536.0, 65536.0, 32768.0], name
        assert load(out)["iter_num"] == 3 and load(out, "ckpt_prev.pt")["iter_num"] == 2
        assert_same(tensors(out), tensors(out, "ckpt_prev.pt"))
        assert load(out)["skipped"] == 0 and not of_kind(records(out), "skip")


def test_fsdp_without_torchrun_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    (line,) = refused(lambda: run(tmp_path / "new", parallel="fsdp"), "torchrun", "fsdp")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("variant", [*VARIANTS, "adam"])
def test_activation_checkpointing_changes_no_number(alone, tmp_path, variant):
    """The blocks are computed again with the same masks."""
    options = VARIANTS.get(variant, dict(template=variant))
    for dropout in (0.0, 0.3) if variant == "yuriiformer" else (0.3,):
        outs = [tmp_path / f"{dropout}-{again}" for again in (False, True)]
        for out, again in zip(outs, (False, True), strict=True):
            alone(out, dropout=dropout, dtype="float64", activation_checkpointing=again, **options)
        ours, theirs = outs
        assert np.abs(losses(ours) - losses(theirs)).max() < 1e-12
        assert largest_difference(tensors(ours), tensors(theirs)) < 1e-12
        assert_same(load(ours)["rng"], load(theirs)["rng"])


def test_activation_checkpointing_computes_blocks_again(alone, tmp_path, monkeypatch):
    """Twice in training, once in an evaluation."""
    import model

    calls = []

    def forward(self, *args, wrapped=model.Block.forward, **kwargs):
        calls.append(torch.is_grad_enabled())
        return wrapped(self, *args, **kwargs)

    monkeypatch.setattr(model.Block, "forward", forward)
    for again in (False, True):
        calls.clear()
        alone(tmp_path / f"{again}", max_iters=1, activation_checkpointing=again)
        assert calls.count(False) == 2 * 2 and calls.count(True) == (1 + again) * 2 * 2


# -----------------------------------------------------------------------------
# Numbers that go bad


BAD = {"loss nan": dict(loss=math.nan), "loss inf": dict(loss=math.inf),
       "gradient nan": dict(gradient=math.nan), "gradient inf": dict(gradient=math.inf)}


@pytest.mark.parametrize("how", BAD)
def test_a_step_that_is_not_finite_stops_the_run(alone, tmp_path, how):
    alone(tmp_path, max_iters=2)
    before = (tmp_path / "ckpt.pt").read_bytes()
    options = dict(max_iters=9, init_from="resume", eval_interval=100)
    moved = []

    def watch(patch):
        patch.setattr(torch.optim.AdamW, "step", lambda *_, **__: moved.append(True))

    (line,) = refused(lambda: alone(tmp_path, partial(spoil, (2,), **BAD[how]), watch, **options),
                      "step 2", "loss", "norm", "step 2, is", f"{tmp_path}/ckpt.pt", "--nan=skip")
    assert moved == [] and (tmp_path / "ckpt.pt").read_bytes() == before
    refused(lambda: alone(tmp_path, partial(spoil, (4,), **BAD[how]), **options), "step 4:",
            f"the last good checkpoint, of step 2, is {tmp_path}/ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    refused(lambda: alone(tmp_path / "new", partial(spoil, (0,), **BAD[how])), "step 0",
            "no checkpoint yet")


@pytest.mark.parametrize("parallel", ["ddp", torture("fsdp")])
@pytest.mark.parametrize("how", [how if how == "loss nan" else torture(how) for how in BAD])
def test_one_bad_rank_stops_all(job, tmp_path, parallel, how):
    """After the checkpoint of step 2, in step 3; every rank ends with code 2."""
    options = dict(YURII, parallel=parallel, optimizer="muon")
    both = dict(options, init_from="resume", max_iters=9, eval_interval=100)
    ranks(2, job(tmp_path, max_iters=2, **options))
    before = (tmp_path / "ckpt.pt").read_bytes()
    first, _ = broken(2, job(tmp_path, partial(spoil, (3,), where=1, **BAD[how]), **both))
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    (line,) = [line for line in first.splitlines() if line.startswith("error")]
    assert "Traceback" not in first
    for word in ("step 3:", "the loss is ", "gradient norm ", "of step 2", f"{tmp_path}/ckpt.pt"):
        assert word in line, line
    assert ("the loss is nan" in line or "the loss is inf" in line) == how.startswith("loss"), line


@pytest.mark.parametrize("world, parallel", [(1, "ddp"), torture(2, "ddp"), (2, "fsdp")])
def test_skipping_leaves_the_step_out(alone, job, tmp_path, capsys, world, parallel):
    """On all ranks, whichever went bad, whichever way; all else goes on as it would have."""
    options = dict(YURII, optimizer="muon", dropout=0.1, parallel=parallel, nan="skip",
                   save_interval=3)
    hows = BAD if world == 1 else ("loss nan", "gradient inf")
    cases = {how: partial(spoil, (1, 4), where=world - 1, **BAD[how]) for how in hows}
    cases["left out"] = partial(leave_out, (1, 4))
    if world == 1:
        said = []
        for name, hook in cases.items():
            alone(tmp_path / name, hook, **options)
            said.append(capsys.readouterr().out)
    else:
        said = ranks(world, *(job(tmp_path / n, hook, **options) for n, hook in cases.items()))
    for name, words in zip(hows, said, strict=False):
        out = tmp_path / name
        assert_same(tensors(out), tensors(tmp_path / "left out"))
        assert_same(load(out)["rng"], load(tmp_path / "left out")["rng"])
        ours, theirs = ([r for r in without_times(records(path)) if r["type"] == "train"
                         and r["iter"] not in (1, 4)] for path in (out, tmp_path / "left out"))
        assert ours == theirs
        skips = of_kind(records(out), "skip")
        assert [(r["iter"], r["skipped"]) for r in skips] == [(1, 1), (4, 2)], name
        assert load(out)["skipped"] == 2 and "done: 6 steps, 2 left out" in words
        assert "NaN" not in (out / "log.jsonl").read_text()
    assert "left out" not in said[-1].split("done:")[-1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fp16_overflow_is_the_scalers(alone, tmp_path, optimizer):
    """A finite loss with an infinite gradient: not counted, the scale halves, nan=stop goes on."""
    hooks = partial(spoil, (1,), gradient=math.inf), partial(log_scale, tmp_path / "scale")
    alone(tmp_path / "run", *hooks, dtype="float16", optimizer=optimizer, max_iters=3)
    assert scales(tmp_path / "scale") == [65536.0, 32768.0, 32768.0]
    assert not of_kind(records(tmp_path / "run"), "skip")
    assert load(tmp_path / "run")["skipped"] == 0
    refused(lambda: alone(tmp_path / "nan", partial(spoil, (1,), loss=math.nan), dtype="float16",
                          optimizer=optimizer, max_iters=3), "step 1:", "the loss is nan")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_when_one_optimisers_gradients_overflow_neither_steps(alone, tmp_path, kind):
    options = dict(YURII, dtype="float16", optimizer="muon", save_interval=1)
    alone(tmp_path, partial(overflow_shard, (2,), 0, kind), partial(stop_after, 3), **options)
    assert load(tmp_path)["iter_num"] == 3 and load(tmp_path, "ckpt_prev.pt")["iter_num"] == 2
    assert_same(tensors(tmp_path), tensors(tmp_path, "ckpt_prev.pt"))
    assert load(tmp_path)["scaler"]["scale"] == 32768.0 and load(tmp_path)["skipped"] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_endless_overflow_ends(alone, tmp_path, optimizer):
    """When the scale has come down to 1 it is not the scale."""
    hooks = partial(spoil, range(10**6), gradient=math.nan), partial(log_scale, tmp_path / "scale")
    refused(lambda: alone(tmp_path / "run", *hooks, dtype="float16", optimizer=optimizer,
                          max_iters=1000, eval_interval=1000), "gradient norm nan", "no update")
    assert 1.0 in scales(tmp_path / "scale") and len(scales(tmp_path / "scale")) < 40


def test_fp16_recovers_from_a_long_bad_stretch(alone, tmp_path):
    """With nan=skip, however long: the scale does not sink to where nothing can be learnt."""
    hooks = partial(spoil, range(200), loss=math.nan), partial(log_scale, tmp_path / "scale")
    alone(tmp_path / "run", *hooks, dtype="float16", nan="skip", max_iters=203, eval_interval=1000,
          batch_size=1, gradient_accumulation_steps=1, n_layer=1)
    assert load(tmp_path / "run")["skipped"] == 200
    assert all(r["grad_norm"] for r in of_kind(records(tmp_path / "run"), "train")[200:])
    assert min(scales(tmp_path / "scale")) >= 1
