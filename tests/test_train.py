"""train.py: options, optimisers, schedule, a step's gradients, evaluation, numbers that go bad, and
what a user does wrong.

Runs are tiny and in this process (conftest's `run`).
"""

import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    BAD,
    HOURGLASS,
    assert_same,
    largest_difference,
    load,
    log_scale,
    losses,
    of_kind,
    refused,
    scales,
    spoil,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import bench
import model
import train
from model import GPT, GPTConfig
from support.checkpoint import model_from
from support.data import WindowOrder
from train import TrainConfig, lr_multiplier

YURII = dict(template="nesterov")
OPTIMIZERS = ("adamw", "muon")


# -----------------------------------------------------------------------------
# Optimisers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_is_in_one_group_with_its_rates(optimizer):
    """Of its role, of which there are tests in test_model.py."""
    config = TrainConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8, bias=True,
                         template="tmm", learning_rate=1e-3, weight_decay=0.2, muon_lr=0.02,
                         muon_weight_decay=0.3, optimizer=optimizer)
    made = GPT(GPTConfig(**train.model_args(config)))
    optimizers = train.make_optimizers(made, config, torch.device("cpu"))
    matrix = ("adamw", 1e-3, 0.2) if optimizer == "adamw" else ("muon", 0.02, 0.3)
    expected = {"matrix": matrix, "embedding": ("adamw", 1e-3, 0.2), "norm": ("adamw", 1e-3, 0.0),
                "scalar": ("adamw", 5e-3, 0.0)}
    found = [(p, (kind, g["lr"], g["weight_decay"])) for kind, o in optimizers.items()
             for g in o.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)) == len(list(made.parameters()))
    for role, named in made.parameter_roles().items():
        assert named and {dict(found)[p] for p in named.values()} == {expected[role]}
    assert {g["betas"] for g in optimizers["adamw"].param_groups} == {(0.9, 0.95)}
    if optimizer == "muon":
        (group,) = optimizers["muon"].param_groups
        assert (group["momentum"], group["nesterov"], group["ns_steps"]) == (0.95, True, 5)


def test_three_steps_by_hand(run, tmp_path, data_dir):
    """Data order, accumulation, clipping, schedule and AdamW, all written out in float64."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32, bias=False,
                          template="nesterov")).double()
    torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, tmp_path / "w.pt")
    records = run(tmp_path / "out", init_from=tmp_path / "w.pt", dtype="float64", grad_clip=0.5,
                  learning_rate=1e-2, min_lr=2e-3, warmup_iters=1, max_iters=3, beta2=0.9, seed=3)
    stream = np.fromfile(data_dir / "tiny" / "train.bin", "<u2").astype(np.int64)
    order = WindowOrder(343, 16, seed=3)
    role = {n: role for role, named in model.parameter_roles().items() for n in named}
    m = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    rates = [0.5, 1.0, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2))]  # warm-up, peak, half-way
    for t, rate in enumerate(rates, 1):
        rows = torch.from_numpy(np.stack([stream[s:s + 17] for s in order.starts(8 * (t - 1), 8)]))
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        gradients = dict(zip(m, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norm > 0.5  # it is clipped
        record = of_kind(records, "train")[t - 1]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
        assert record["lr"] == pytest.approx(rate * 1e-2)
        with torch.no_grad():
            for n, p in model.named_parameters():
                g = gradients[n] * (0.5 / (norm + 1e-6))
                lr = rate * 1e-2 * (5 if role[n] == "scalar" else 1)
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.9 * v[n] + 0.1 * g * g
                p *= 1 - lr * (0.1 if role[n] in ("matrix", "embedding") else 0.0)
                p -= lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.9**t)).sqrt() + 1e-8)
    assert largest_difference(dict(model.state_dict()), load(tmp_path / "out")["model"]) < 1e-10


# -----------------------------------------------------------------------------
# Schedule


@pytest.mark.parametrize("options, shape", [
    (dict(schedule="wsd", decay_fraction=0.5), {0: 1 / 11, 9: 10 / 11, 10: 1, 50: 1, 75: 0.55,
                                                100: 0.1, 150: 0.1}),
    (dict(schedule="wsd", warmup_iters=0, min_lr=0.0), {0: 1, 80: 1, 90: 0.5, 99: 0.05, 100: 0}),
    (dict(schedule="constant"), {0: 1 / 11, 10: 1, 99: 1, 150: 1}),
    (dict(decay_lr=False), {0: 1, 5: 1, 99: 1, 150: 1}),
    (dict(lr_decay_iters=None, max_iters=100, warmup_iters=0), {0: 1, 50: 0.55, 100: 0.1}),
    (dict(lr_decay_iters=110, min_lr=6e-5, max_iters=200),  # nanoGPT's
     {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1, 35: 0.1 + 0.45 * (1 + math.cos(math.pi / 4)),
      60: 0.55, 110: 0.1, 111: 0.1, 199: 0.1}),
])
def test_schedules(options, shape):
    config = TrainConfig(**dict(warmup_iters=10, max_iters=150, lr_decay_iters=100) | options)
    for step, share in shape.items():
        assert lr_multiplier(step, config) == pytest.approx(share, abs=1e-12), step


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(dict(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]), max_iters=st.integers(1, 60),
    warmup_iters=st.integers(0, 70), lr_decay_iters=st.none() | st.integers(1, 70),
    decay_fraction=st.floats(0.01, 1), learning_rate=st.sampled_from([0.0, 1.0]),
    min_lr=st.none() | st.floats(0, 1) | st.just(2.0), decay_lr=st.booleans())))
def test_an_accepted_schedule_warms_up_holds_and_decays(options):
    """It never rises after the warm-up, and in no step by more than the steepest of its form."""
    end, decay = options["lr_decay_iters"] or options["max_iters"], 1
    if options["schedule"] == "wsd":
        decay = max(1, round(options["decay_fraction"] * end))
    try:
        config = TrainConfig(**options)
    except ValueError as error:
        rising = (options["min_lr"] or 0.0) > options["learning_rate"]
        assert rising == ("is the floor of learning_rate" in str(error))
        if not rising:
            assert f"decay, which begins at step {end - decay} " in str(error)
            assert end - decay < options["warmup_iters"] < options["max_iters"]
        assert options["schedule"] != "constant" and options["decay_lr"]
        return
    shares = np.array([lr_multiplier(step, config) for step in range(config.max_iters)])
    warmup = min(config.warmup_iters if config.decay_lr else 0, config.max_iters)
    rising = (np.arange(warmup) + 1) / (config.warmup_iters + 1)
    assert np.allclose(shares[:warmup], rising)
    length = decay if config.schedule == "wsd" else end - warmup
    falls = -np.diff(shares[warmup:], prepend=1.0)
    assert (falls >= 0).all()
    assert not falls.any() or 0 < falls.max() <= math.pi / 2 / length + 1e-12


def test_one_multiplier_for_all_groups(run, tmp_path):
    """Three groups of AdamW's and one of Muon's, in each step."""
    shares = []

    def watch(optimizer, args, kwargs):
        shares.extend(group["lr"] / group["peak_lr"] for group in optimizer.param_groups)

    handle = register_optimizer_step_pre_hook(watch)
    try:
        run(tmp_path, template="nesterov", optimizer="muon", max_iters=5)
    finally:
        handle.remove()
    config = TrainConfig(max_iters=5, warmup_iters=2, learning_rate=1e-3)
    assert shares == pytest.approx([lr_multiplier(step, config) for step in range(5)
                                    for _ in range(3 + 1)])


# -----------------------------------------------------------------------------
# A step's gradients


def test_fp16_gradients_are_clipped_and_logged_unscaled(run, tmp_path):
    """The loss is scaled by 65,536 on the way back."""
    for dtype in ("float32", "float16"):
        run(tmp_path / dtype, dtype=dtype, grad_clip=0.1, optimizer="muon", max_iters=3)
    found, expected = losses(tmp_path / "float16"), losses(tmp_path / "float32")
    assert np.allclose(found[:, 0], expected[:, 0], rtol=1e-3)
    assert np.allclose(found[:, 1], expected[:, 1], rtol=0.02)
    found, expected = (load(tmp_path / dtype)["optimizer"]["adamw"] for dtype in
                       ("float16", "float32"))
    for name, state in expected.items():
        moment = found[name]["exp_avg"]
        assert (moment - state["exp_avg"]).norm() < 0.1 * state["exp_avg"].norm(), name


@pytest.mark.parametrize("variant", [dict(bias=True), YURII, HOURGLASS, dict(template="adam")],
                         ids=lambda v: [*v][0])
def test_activation_checkpointing_changes_no_number(run, tmp_path, monkeypatch, variant):
    """The blocks are computed again with the same masks: twice in training, once in evaluation."""
    calls = []

    def forward(self, *args, wrapped=model.Block.forward, **kwargs):
        calls.append(torch.is_grad_enabled())
        return wrapped(self, *args, **kwargs)

    monkeypatch.setattr(model.Block, "forward", forward)
    for again in (False, True):
        calls.clear()
        run(tmp_path / f"{again}", dropout=0.3, dtype="float64", activation_checkpointing=again,
            max_iters=3, eval_tokens=64, **variant)
        assert calls.count(False) == 2 * 2 and calls.count(True) == (1 + again) * 3 * 2 * 2
    found, expected = tmp_path / "True", tmp_path / "False"
    assert np.abs(losses(found) - losses(expected)).max() < 1e-12
    assert largest_difference(tensors(found), tensors(expected)) < 1e-12
    assert_same(load(found)["rng"], load(expected)["rng"])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))),
                    reason="no C++ compiler for torch.compile")
def test_compiled_training_is_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)  # another graph to compile
    options = dict(template="nesterov", n_layer=1, max_iters=2)
    run(tmp_path / "eager", **options)
    run(tmp_path / "compiled", "--compile", **options)
    assert np.allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-4)


# -----------------------------------------------------------------------------
# Evaluation


def test_evaluation_is_the_mean_over_its_windows(run, tmp_path, data_dir):
    """In float64, without dropout."""
    options = dict(dataset="long_val", eval_tokens=129 * 16 + 3, max_iters=2, dtype="float64",
                   dropout=0.5, template="nesterov")
    record = run(tmp_path, **options)[-1]
    checkpoint = load(tmp_path)
    trained = model_from(checkpoint, dropout=0.0)
    val = np.fromfile(data_dir / "long_val" / "val.bin", "<u2").astype(np.int64)
    starts = [i * 150 // 129 * 16 for i in range(129)]
    rows = torch.from_numpy(np.stack([val[s:s + 17] for s in starts]))
    with torch.no_grad():
        logits = trained(rows[:, :-1], rows[:, 1:])[0].numpy()
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, rows[:, 1:, None].numpy(), -1)[..., 0]
    assert record["type"] == "eval" and record["iter"] == 2
    assert record["val_loss"] == pytest.approx((log_z - chosen).mean(), rel=1e-12)


# -----------------------------------------------------------------------------
# Numbers that go bad


@pytest.mark.parametrize("how", BAD)
def test_a_step_that_is_not_finite_stops_the_run(run, tmp_path, how):
    """Before its update, with the name of the last good checkpoint."""
    run(tmp_path, max_iters=2)
    before = (tmp_path / "ckpt.pt").read_bytes()
    options = dict(max_iters=9, init_from="resume", eval_interval=100)
    moved = []

    def watch(patch):
        patch.setattr(torch.optim.AdamW, "step", lambda *_, **__: moved.append(True))

    good = f"the last good checkpoint, of step 2, is {tmp_path}/ckpt.pt"
    (line,) = refused(lambda: run(tmp_path, hooks=[partial(spoil, (2,), **BAD[how]), watch],
                                  **options), "step 2", "loss", "norm", good)
    assert moved == []
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    refused(lambda: run(tmp_path / "new", hooks=[partial(spoil, (0,), **BAD[how])]), "step 0",
            "no checkpoint yet")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fp16_overflow_is_the_scalers(run, tmp_path, optimizer):
    """A finite loss with an infinite gradient: the scale halves; down to 1, where it is not the
    scale. A loss of nan never is."""
    options = dict(dtype="float16", optimizer=optimizer)
    hook = partial(log_scale, tmp_path / "scale")
    run(tmp_path / "run", hooks=[partial(spoil, (1,), gradient=math.inf), hook], max_iters=3,
        **options)
    assert scales(tmp_path / "scale") == [65536.0, 32768.0, 32768.0]
    refused(lambda: run(tmp_path / "nan", hooks=[partial(spoil, (1,), loss=math.nan)], **options),
            "step 1:", "the loss is nan")
    endless = partial(spoil, range(10**6), gradient=math.nan)
    refused(lambda: run(tmp_path / "endless", hooks=[endless, hook], max_iters=1000,
                        eval_interval=1000, **options), "gradient norm nan", "no update",
            "try --dtype=float32")
    assert 1.0 in scales(tmp_path / "scale") and len(scales(tmp_path / "scale")) < 40


# -----------------------------------------------------------------------------
# What a machine cannot do, and what a user does wrong


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_out_of_memory_says_what_to_halve(run, tmp_path, monkeypatch, error):
    def too_large(*_, **__):
        raise error

    monkeypatch.setattr(GPT, "forward", too_large)
    refused(lambda: run(tmp_path / "new"), "halve --batch_size", "--gradient_accumulation_steps",
            "--activation_checkpointing")
    refused(lambda: bench.main(["speed", "--device=cpu", "--n_layer=1", "--n_embd=12",
                                "--block_size=8", "--vocab_size=32"]), "halve --batch_size")
    error = RuntimeError("a size mismatch")
    with pytest.raises(RuntimeError, match="a size mismatch"):  # others keep their traceback
        run(tmp_path / "new")
