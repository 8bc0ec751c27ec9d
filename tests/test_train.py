"""train.py: the order of the data, evaluation, accumulation, processes, optimisers, schedules,
checkpoints and resuming, logs, compilation, and what a user does wrong.

Runs are tiny and in this process (conftest's `run`); "bit for bit" is torch.equal.
"""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, write_data
from torch.optim.optimizer import register_optimizer_step_pre_hook

import bench
import sample
import train
from model import GPT, GPTConfig
from support.checkpoint import model_from
from support.errors import UserError, cli

ROOT = Path(__file__).parent.parent
HOURGLASS = dict(ffn="hourglass", ffn_depth=2, head_dim=8, norm="rmsnorm", position="rope",
                 qk_norm=True, residual_init_scale=False)
TIMES = {"tokens_per_s", "mfu", "seconds", "peak_mb"}  # what a log record has of the machine


def load(out, name="ckpt.pt") -> dict:
    return torch.load(Path(out, name), weights_only=True)


def largest_difference(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same(ours, theirs, path=""):
    """Equal, tensors bit for bit, all the way down."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), path
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


def without_times(records):
    return [{k: v for k, v in r.items() if k not in TIMES | {"out_dir", "init_from"}}
            for r in records]


def of_kind(records, kind):
    return [r for r in records if r["type"] == kind]


def refused(call, *said):
    """The call is a user error whose lines have these words; returns the lines."""
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in said), error.value
    return str(error.value).splitlines()


# -----------------------------------------------------------------------------
# The order of the data


@pytest.mark.parametrize("n_tokens", [17, 31, 32, 33, 47, 48, 160, 161, 175, 176, 1605])
def test_an_epoch_visits_every_window_once(n_tokens, T=16):
    order = train.WindowOrder(n_tokens, T, seed=1)
    W = max(1, (n_tokens - T) // T)
    assert order.per_epoch == W
    offsets, orders = [], []
    for epoch in range(40):
        starts = order.starts(epoch * W, W)
        offsets.append(min(starts))
        orders.append([(s - offsets[-1]) // T for s in starts])
        assert sorted(starts) == [offsets[-1] + i * T for i in range(W)]
        assert max(starts) + T + 1 <= n_tokens
    assert offsets[0] == 0 and 0 <= min(offsets) and max(offsets) < T
    assert len(set(offsets)) > 5 or n_tokens < 2 * T  # the grid moves between epochs
    assert len({tuple(o) for o in orders}) > 20 or W < 8  # and the order is drawn anew


def test_the_order_is_arithmetic_on_the_position_and_the_seed():
    order, W = train.WindowOrder(343, 16, seed=1), 20
    whole = order.starts(0, 5 * W)
    assert [s for p in range(0, 5 * W, 3) for s in order.starts(p, 3)][:5 * W] == whole
    assert train.WindowOrder(343, 16, seed=1).starts(W - 2, 4) == whole[W - 2:W + 2]  # at an edge
    assert train.WindowOrder(343, 16, seed=2).starts(0, W) != whole[:W]


@pytest.mark.parametrize("n", [*range(1, 40), 1000, 4097, 100_003])
def test_the_order_of_an_epoch_is_a_permutation_that_is_not_stored(n):
    keys = np.random.SeedSequence([n, 7]).generate_state(8, np.uint64)
    whole = train.permuted(np.arange(n), n, keys)
    assert sorted(whole.tolist()) == list(range(n))
    assert train.permuted(np.array([n // 2]), n, keys) == whole[n // 2]  # one entry alone
    if n > 500:  # as far from its place, and from its neighbour, as chance has it
        assert abs(np.corrcoef(np.arange(n), whole)[0, 1]) < 4 / n ** 0.5
        assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 4 / n ** 0.5


@pytest.fixture
def windows_read(run, tmp_path, monkeypatch):
    """windows_read(batch, accumulation, rank, world): per step the starts of the windows that
    training reads in a run on `count`, where a token is its position."""
    read = []

    def spy(rows, device, to_device=train.to_device):
        read.extend(rows[:, 0].tolist())
        return to_device(rows, device)

    monkeypatch.setattr(train, "to_device", spy)
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)

    def go(batch, accumulation, rank=0, world=1):
        class Ranks(train.Ranks):  # one of several processes, without the others
            def __init__(self, config):
                super().__init__(config)
                self.rank, self.world = rank, world

        monkeypatch.setattr(train, "Ranks", Ranks)
        read.clear()
        run(tmp_path / f"{batch}-{accumulation}-{rank}", dataset="count", batch_size=batch,
            gradient_accumulation_steps=accumulation, max_iters=6)
        return np.array(read).reshape(6, -1)

    return go


@pytest.mark.parametrize("batch, accumulation, world",
                         [(8, 1, 1), (2, 4, 1), (4, 2, 2), (1, 8, 2), (2, 4, 4)])
def test_a_step_reads_the_same_windows_however_it_is_cut(windows_read, batch, accumulation, world):
    """48 windows of epochs of 20: the ranks share out every step, also over an epoch's edge."""
    ranks = [windows_read(batch, accumulation, rank, world) for rank in range(world)]
    assert {r.shape for r in ranks} == {(6, 8 // world)}
    expected = np.reshape(train.WindowOrder(343, 16, TINY.get("seed", 1337)).starts(0, 48), (6, 8))
    assert (np.sort(np.concatenate(ranks, axis=1)) == np.sort(expected)).all()


@pytest.mark.parametrize("dtype, ids", [
    ("uint16", [0, 1, 32767, 32768, 50256, 65535]), ("uint32", [0, 32768, 65535, 65536, 100_276]),
])
def test_ids_and_shifted_targets(tmp_path, dtype, ids):
    stream = np.tile(ids, 9)
    folder = write_data(tmp_path / "d", stream, dtype=dtype)
    tokens = train.Tokens(str(folder), "train", {"dtype": dtype, "vocab_size": 2**32}, 8)
    starts = [0, 5, len(stream) - 9]
    x, y = train.to_device(tokens.read(starts), torch.device("cpu"))
    assert len(tokens) == len(stream) and x.dtype == y.dtype == torch.int64
    assert x.tolist() == [stream[s:s + 8].tolist() for s in starts]
    assert y.tolist() == [stream[s + 1:s + 9].tolist() for s in starts]


def test_prefetch_keeps_the_order_and_raises_here():
    def items():
        yield from range(20)
        raise KeyError("the end")

    made = train.prefetch(items())
    assert [next(made) for _ in range(20)] == list(range(20))
    with pytest.raises(KeyError):
        next(made)


# -----------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("n_tokens, eval_tokens", [
    (17, 1000), (33, 16), (1605, 1605), (1605, 10**9), (1605, 160), (1605, 50), (1605, 1),
    (1600, 800), (1601, 1584), (1605, 1500)])
def test_evaluation_windows(n_tokens, eval_tokens, T=16):
    starts = train.evaluation_starts(n_tokens, T, eval_tokens)
    everything = list(range(0, n_tokens - T, T))  # the tail that fills no window is dropped
    gaps = np.diff(starts)
    assert len(starts) == min(len(everything), max(1, eval_tokens // T))
    assert starts[0] == 0 and set(starts) <= set(everything)
    assert len(gaps) == 0 or (gaps.min() >= T and gaps.max() - gaps.min() <= T)
    assert n_tokens - starts[-1] <= n_tokens / len(starts) + 2 * T  # to the end of the split
    assert eval_tokens < n_tokens or starts == everything


@pytest.fixture(scope="module")
def long_val(data_dir):
    """A validation split of 562 windows of 16: more than evaluate() takes at once."""
    rng = np.random.default_rng(1)
    write_data(data_dir / "long_val", rng.integers(256, size=343), rng.integers(256, size=9005))
    return dict(dataset="long_val", eval_tokens=530 * 16 + 3)


def test_evaluation_does_not_depend_on_the_batch(run, tmp_path, long_val):
    figures = {run(tmp_path / f"{b}x{a}", batch_size=b, gradient_accumulation_steps=a, max_iters=1,
                   **long_val)[1]["val_loss"] for b, a in ((1, 1), (4, 2), (7, 1), (2, 4))}
    assert len(figures) == 1


def test_evaluation_is_the_mean_over_its_windows(run, tmp_path, long_val, data_dir):
    record = run(tmp_path, dtype="float64", dropout=0.5, template="nesterov", max_iters=2,
                 **long_val)[-1]
    checkpoint = load(tmp_path)
    model = model_from(checkpoint, dropout=0.0).double()
    model.load_state_dict(checkpoint["model"])  # in float64
    val = np.fromfile(data_dir / "long_val" / "val.bin", "<u2").astype(np.int64)
    starts = [i * 562 // 530 * 16 for i in range(530)]
    rows = torch.from_numpy(np.stack([val[s:s + 17] for s in starts]))
    with torch.no_grad():
        logits = model(rows[:, :-1], rows[:, 1:])[0].numpy()
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, rows[:, 1:, None].numpy(), -1)[..., 0]
    assert record["type"] == "eval" and record["iter"] == 2
    assert record["val_loss"] == pytest.approx((log_z - chosen).mean(), rel=1e-12)


def test_eval_only_writes_nothing(run, tmp_path, capsys):
    run(tmp_path / "a")
    before = sorted(p.name for p in (tmp_path / "a").iterdir())
    best = load(tmp_path / "a")["best_val_loss"]
    kept = (tmp_path / "a" / "log.jsonl").read_bytes()
    capsys.readouterr()
    run(tmp_path / "a", "--eval_only", init_from="resume")
    assert f"val loss {best:.4f}" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == before
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == kept


# -----------------------------------------------------------------------------
# Gradient accumulation and several processes


@pytest.mark.parametrize("variant", [dict(bias=True), dict(template="nesterov"),
                                     dict(HOURGLASS, template="tmm")], ids=lambda v: [*v][-1])
def test_accumulation_equals_one_big_batch(run, tmp_path, variant):
    """exp_avg after the first step is 0.1 x the gradient."""
    def one_step(batch, accumulation):
        out = tmp_path / f"{accumulation}"
        records = run(out, batch_size=batch, gradient_accumulation_steps=accumulation, max_iters=1,
                      eval_tokens=160, dtype="float64", grad_clip=0, **variant)
        state = load(out)
        gradients = {n: s["exp_avg"] for n, s in state["optimizer"]["adamw"].items()}
        return state["model"], gradients, of_kind(records, "train")[0]

    model, gradients, record = one_step(8, 1)
    assert max(g.abs().max() for g in gradients.values()) > 1e-4
    for batch, accumulation in ((4, 2), (1, 8)):
        theirs = one_step(batch, accumulation)
        assert largest_difference(gradients, theirs[1]) < 1e-15
        assert largest_difference(model, theirs[0]) < 1e-12
        assert theirs[2]["loss"] == pytest.approx(record["loss"], abs=1e-6)
        assert theirs[2]["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-9)


def test_fp16_gradients_are_clipped_and_logged_unscaled(run, tmp_path):
    """The loss is scaled by 65,536 on the way back."""
    options = dict(grad_clip=0.1, optimizer="muon", max_iters=3)
    wide, narrow = (of_kind(run(tmp_path / dtype, dtype=dtype, **options), "train")
                    for dtype in ("float32", "float16"))
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
    ours, theirs = (load(tmp_path / dtype) for dtype in ("float16", "float32"))
    for name, state in theirs["optimizer"]["adamw"].items():
        moment = ours["optimizer"]["adamw"][name]["exp_avg"]
        assert (moment - state["exp_avg"]).norm() < 0.1 * state["exp_avg"].norm(), name


# -----------------------------------------------------------------------------
# Optimisers


def expected_role(name, p):
    """By name alone, unlike model.parameter_roles, which goes by module."""
    last = name.split(".")[-1]
    if ".steps." in name and ".norm." not in name:
        return "scalar"
    if name.split(".")[-2] in ("wte", "wpe", "vte", "vpe"):
        return "table"
    return "matrix" if last == "weight" and p.ndim == 2 else "norm"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("variant", [
    dict(bias=True), dict(template="tmm", splitting="strang"), dict(template="adamw"),
    dict(template="symplectic", bias=True), dict(velocity_init="add"),
    dict(HOURGLASS, template="nesterov", ffn_substeps="each")], ids=lambda v: [*v][-1])
def test_every_parameter_is_in_one_group_with_its_rates(variant, optimizer):
    config = train.TrainConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8,
                               learning_rate=1e-3, muon_lr=0.02, muon_weight_decay=0.3,
                               weight_decay=0.2, optimizer=optimizer, **variant)
    model = GPT(GPTConfig(**train.model_args(config)))
    optimizers = train.make_optimizers(model, config, torch.device("cpu"))
    rates = {p: (kind, g["lr"], g["weight_decay"]) for kind, o in optimizers.items()
             for g in o.param_groups for p in g["params"]}
    places = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    assert len(places) == len(rates) == len(list(model.parameters()))
    matrix = ("adamw", 1e-3, 0.2) if optimizer == "adamw" else ("muon", 0.02, 0.3)
    expected = {"matrix": matrix, "table": ("adamw", 1e-3, 0.2), "norm": ("adamw", 1e-3, 0.0),
                "scalar": ("adamw", 5e-3, 0.0)}
    for name, p in model.named_parameters():
        assert rates[p] == expected[expected_role(name, p)], name
    assert {g["betas"] for g in optimizers["adamw"].param_groups} == {(0.9, 0.95)}
    if optimizer == "muon":
        (group,) = optimizers["muon"].param_groups
        assert (group["momentum"], group["nesterov"], group["ns_steps"]) == (0.95, True, 5)


@pytest.mark.parametrize("rate", [0.125, 0.0])
def test_scalar_lr_can_be_set(rate):
    config = train.TrainConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=4, block_size=4,
                               template="nesterov", scalar_lr=rate)
    (adamw,) = train.make_optimizers(GPT(GPTConfig(**train.model_args(config))), config,
                                     torch.device("cpu")).values()
    assert {g["role"]: g["lr"] for g in adamw.param_groups}["scalar"] == rate


def test_muon_is_newton_schulz_of_nesterov_momentum():
    """Written from the description: momentum 0.95, 5 quintic steps in bf16, scaled by
    sqrt(max(1, rows / cols))."""
    config = train.TrainConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=7, block_size=4,
                               optimizer="muon", muon_lr=0.1, muon_weight_decay=0.5)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**train.model_args(config)))
    muon = train.make_optimizers(model, config, torch.device("cpu"))["muon"]
    names = dict(model.named_parameters())
    matrices = {n: p for n, p in names.items() if ".h." in n and p.ndim == 2}
    weights = {n: p.detach().clone() for n, p in matrices.items()}
    momenta = {n: torch.zeros_like(p) for n, p in matrices.items()}
    assert {(p.size(0) / p.size(1)) for p in matrices.values()} == {3, 1, 4, 0.25}
    for _ in range(3):
        for n, p in matrices.items():
            p.grad = torch.randn_like(p) @ torch.diag(torch.linspace(0.01, 3, p.size(1)))
            momenta[n] = 0.95 * momenta[n] + p.grad
            x = (p.grad + 0.95 * momenta[n]).bfloat16()
            x = x.T if p.size(0) > p.size(1) else x
            x = x / x.norm()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = (x.T if p.size(0) > p.size(1) else x).float()
            scale = math.sqrt(max(1, p.size(0) / p.size(1)))
            weights[n] = (1 - 0.1 * 0.5) * weights[n] - 0.1 * scale * x
        muon.step()
    for n, p in matrices.items():
        assert (p - weights[n]).norm() < 0.05 * p.norm(), n  # bf16 rounds


@pytest.mark.parametrize("world", [None, 1, 2, 3, 5])
def test_muon_is_torchs(world, monkeypatch):
    """Also where it is divided over processes: every one is played here, one after the other."""
    shapes = [(32, 8), (8, 32), (16, 16), (16, 16), (8, 32), (16, 16), (1, 5)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    sizes = []
    if world:
        ours, real = train.share_out, train.newton_schulz
        monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(train.dist, "get_world_size", lambda: world)

        def played(function, x):
            parts = {}
            for rank in range(world):  # first every process's part, then the exchange
                monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
                monkeypatch.setattr(train.dist, "all_gather_into_tensor", lambda whole, part,
                                    rank=rank: parts.update({rank: part.clone()}))
                ours(function, x)
            monkeypatch.setattr(train.dist, "all_gather_into_tensor", lambda whole, part:
                                whole.copy_(torch.cat([parts[r] for r in range(world)])))
            return ours(function, x)

        monkeypatch.setattr(train, "share_out", played)
        monkeypatch.setattr(train, "newton_schulz",
                            lambda x, group: (sizes.append(len(x)), real(x, group))[1])
    theirs, mine = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = dict(lr=0.1, weight_decay=0.3, momentum=0.95, nesterov=True, ns_steps=5)
    a, b = torch.optim.Muon(theirs, **options), train.Muon(mine, **options)
    for _ in range(3):
        for p, q in zip(theirs, mine, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, before in zip(theirs, mine, start, strict=True):
        assert (p - q).norm() < 0.01 * (p - before).norm()  # bf16 rounds
        torch.testing.assert_close(b.state[q], a.state[p])
    if world:
        assert max(sizes) <= -(-3 // world)  # of the three matrices of a shape


def output_of(program: str) -> list[float]:
    """The numbers that a Python of its own prints, with the environment as it was."""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment,
                          capture_output=True, check=True)
    return [float(word) for word in done.stdout.split()]


def test_freed_memory_is_kept_if_small_and_given_back_if_large():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc's allocator")
    program = """
import resource, sys, torch, train
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
train.tune_allocator()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = [torch.ones(300_000) for _ in range(20)]  # 1.2 MB each
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
x = torch.ones(5_000_000)
del x  # after which glibc keeps up to so much for itself
start = resident()
x = [torch.ones(2_000_000) for _ in range(20)]  # 8 MB each; every second one goes
full = resident()
del x[::2]
print((full - resident()) / (full - start))
"""
    faults, back = output_of(program)
    assert faults < 100
    assert 0.45 < back < 0.55


def test_large_tensors_come_in_huge_pages():
    setting = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(setting) or "[madvise]" not in open(setting).read():
        pytest.skip("huge pages are not for those who ask")
    program = """
import resource, torch, model
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(10**8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    ours, plain = output_of(program), output_of(program.replace("model", "resource"))
    assert ours[0] < 0.2 * plain[0]


def test_three_steps_by_hand(run, tmp_path, data_dir):
    """Data order, accumulation, clipping, schedule and AdamW, all written out in float64."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32, bias=False,
                          template="nesterov")).double()
    torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, tmp_path / "w.pt")
    records = run(tmp_path / "out", init_from=tmp_path / "w.pt", dtype="float64", grad_clip=0.5,
                  learning_rate=1e-2, min_lr=2e-3, warmup_iters=1, max_iters=3, beta2=0.9, seed=3)
    stream = np.fromfile(data_dir / "tiny" / "train.bin", "<u2").astype(np.int64)
    order = train.WindowOrder(343, 16, seed=3)
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
                role, g = expected_role(n, p), gradients[n] * (0.5 / (norm + 1e-6))
                lr = rate * 1e-2 * (5 if role == "scalar" else 1)
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.9 * v[n] + 0.1 * g * g
                p *= 1 - lr * (0.1 if role in ("matrix", "table") else 0.0)
                p -= lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.9**t)).sqrt() + 1e-8)
    trained = load(tmp_path / "out")["model"]
    assert largest_difference(dict(model.state_dict()), dict(trained)) < 1e-10


# -----------------------------------------------------------------------------
# Schedule


def test_cosine_is_nanogpts():
    config = train.TrainConfig(warmup_iters=10, max_iters=200, lr_decay_iters=110, min_lr=6e-5)
    for step, rate in {0: 6e-4 / 11, 4: 6e-4 * 5 / 11, 9: 6e-4 * 10 / 11, 10: 6e-4, 60: 3.3e-4,
                       35: 6e-5 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-4, 110: 6e-5,
                       111: 6e-5, 199: 6e-5}.items():
        assert 6e-4 * train.lr_multiplier(step, config) == pytest.approx(rate, rel=1e-12), step


@pytest.mark.parametrize("options, shape", [
    (dict(schedule="wsd", decay_fraction=0.5), {0: 1 / 11, 9: 10 / 11, 10: 1, 50: 1, 75: 0.55,
                                                100: 0.1, 150: 0.1}),
    (dict(schedule="wsd", warmup_iters=0, min_lr=0.0), {0: 1, 80: 1, 90: 0.5, 99: 0.05, 100: 0}),
    (dict(schedule="constant"), {0: 1 / 11, 10: 1, 99: 1, 150: 1}),
    (dict(decay_lr=False), {0: 1, 5: 1, 99: 1, 150: 1}),
    (dict(schedule="cosine", warmup_iters=0), {0: 1, 50: 0.55, 100: 0.1}),
    (dict(schedule="cosine", warmup_iters=100), {0: 1 / 101, 99: 100 / 101, 100: 0.1}),
])
def test_schedules(options, shape):
    config = train.TrainConfig(**dict(dict(warmup_iters=10, max_iters=150, lr_decay_iters=100),
                                      **options))
    for step, share in shape.items():
        assert train.lr_multiplier(step, config) == pytest.approx(share, abs=1e-12), step


def test_auto_decays_to_a_tenth_at_max_iters():
    config = train.TrainConfig(warmup_iters=0, max_iters=100, learning_rate=1.0)
    assert train.lr_multiplier(50, config) == pytest.approx(0.55)
    assert train.lr_multiplier(100, config) == pytest.approx(0.1)


def test_a_learning_rate_of_zero_trains_nothing(run, tmp_path):
    run(tmp_path, learning_rate=0, min_lr=0, max_iters=4, save_interval=2)
    assert_same(load(tmp_path)["model"], load(tmp_path, "ckpt_prev.pt")["model"])


def test_exactly_max_iters_steps_and_one_multiplier_for_all_groups(run, tmp_path):
    steps = []

    def watch(optimizer, args, kwargs):
        steps.append({g["role"] if "role" in g else "muon": g["lr"]
                      for g in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(watch)
    try:
        records = run(tmp_path, template="nesterov", optimizer="muon", max_iters=5, scalar_lr=0.5)
    finally:
        handle.remove()
    assert len(steps) == 2 * 5 and load(tmp_path)["iter_num"] == 5
    assert [r["iter"] for r in of_kind(records, "train")] == [0, 1, 2, 3, 4]
    assert [r["iter"] for r in of_kind(records, "eval")] == [0, 3, 5]
    config = train.TrainConfig(max_iters=5, warmup_iters=2, learning_rate=1e-3)
    for step in range(5):
        share = train.lr_multiplier(step, config)
        peaks = {"embedding": 1e-3, "norm": 1e-3, "scalar": 0.5, "muon": 0.02}
        rates = steps[2 * step] | steps[2 * step + 1]
        assert rates == pytest.approx({role: share * peak for role, peak in peaks.items()})


# -----------------------------------------------------------------------------
# Checkpoints


def is_plain(value) -> bool:
    """Tensors and plain Python only, of exactly these types."""
    if type(value) is dict:
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return type(value) in (str, int, float, bool, type(None), torch.Tensor)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_plain_and_has_nanogpts_keys(run, tmp_path, optimizer):
    run(tmp_path, optimizer=optimizer, template="tmm")
    checkpoint = load(tmp_path)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "rng",
            "tokens_seen", "versions"} <= checkpoint.keys()
    assert checkpoint["iter_num"] == 6 and checkpoint["tokens_seen"] == 6 * 8 * 16
    assert checkpoint["versions"]["torch"] == str(torch.__version__)
    assert checkpoint["config"]["template"] == checkpoint["model_args"]["template"] == "tmm"
    weights = checkpoint.pop("model")  # an OrderedDict, which weights_only=True admits
    assert is_plain(checkpoint) and all(map(is_plain, weights.values()))
    states = {n for named in checkpoint["optimizer"].values() for n in named}
    assert states == weights.keys() - {"lm_head.weight"}
    model_from(load(tmp_path))


def scripted_losses(monkeypatch, *losses):
    """evaluate() gives these, one after the other."""
    remaining = list(losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: remaining.pop(0))


def test_latest_previous_and_best(run, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 5.0, 3.0, 2.0, 4.0, 1.0, 2.5)
    run(tmp_path, max_iters=3, eval_interval=1, save_interval=3)
    found = {n: load(tmp_path, n) for n in ("ckpt.pt", "best.pt")}
    assert {n: c["iter_num"] for n, c in found.items()} == {"ckpt.pt": 3, "best.pt": 2}
    assert {n: c["best_val_loss"] for n, c in found.items()} == {"ckpt.pt": 2.0, "best.pt": 2.0}
    assert not (tmp_path / "ckpt_prev.pt").exists()
    assert found["best.pt"].keys() == found["ckpt.pt"].keys()  # the full state
    run(tmp_path, max_iters=5, eval_interval=1, save_interval=2, init_from="resume")
    found = {n: load(tmp_path, n)["iter_num"] for n in ("ckpt.pt", "ckpt_prev.pt", "best.pt")}
    assert found == {"ckpt.pt": 5, "ckpt_prev.pt": 4, "best.pt": 4}
    assert load(tmp_path)["best_val_loss"] == 1.0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_checkpoint_holds_weights_that_are_not_finite(run, tmp_path, optimizer):
    """The message says that the last checkpoint is from before the loss broke."""
    rates = dict(learning_rate=1e38, muon_lr=1e38, warmup_iters=0, optimizer=optimizer)
    refused(lambda: run(tmp_path, max_iters=9, save_interval=1, log_interval=3, **rates),
            "the loss is nan")
    for path in tmp_path.glob("*.pt"):
        assert all(w.isfinite().all() for w in load(tmp_path, path.name)["model"].values()), path
    log = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in log and "Infinity" not in log  # which JSON does not have


def test_a_broken_evaluation_does_not_end_the_search_for_the_best(run, tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 5.0, 4.0, math.nan, 3.0)
    run(tmp_path, max_iters=3, eval_interval=1)
    assert load(tmp_path, "best.pt")["iter_num"] == 3


# -----------------------------------------------------------------------------
# Resuming


RESUMED = {
    "gpt": dict(bias=True, dropout=0.1),
    "gpt-muon": dict(optimizer="muon", dropout=0.1),
    "gpt-at-the-epoch's-edge": dict(dataset="edge", dropout=0.1, log_interval=2),
    "nesterov": dict(template="nesterov", dropout=0.1, dtype="float64"),
    "adam-muon": dict(template="adam", optimizer="muon", dropout=0.1),
    "hourglass": dict(HOURGLASS, dropout=0.1),
    "bf16": dict(template="nesterov", dtype="bfloat16", dropout=0.1),
    "fp16-muon": dict(dtype="float16", optimizer="muon", dropout=0.1),
}


@pytest.mark.parametrize("variant", RESUMED)
def test_resuming_is_bit_for_bit(run, tmp_path, variant):
    """From step 3 of 6: in the middle of the second epoch, or where the second begins."""
    options, whole, half = RESUMED[variant], tmp_path / "whole", tmp_path / "half"
    expected = run(whole, eval_interval=2, save_interval=3, **options)
    half.mkdir()
    shutil.copy(whole / "ckpt_prev.pt", half / "ckpt.pt")
    shutil.copy(whole / "log.jsonl", half)  # as a killed run leaves it: longer than the checkpoint
    assert load(half)["iter_num"] == 3
    records = run(half, eval_interval=2, save_interval=3, init_from="resume", **options)
    assert_same(without_times(records), without_times(expected))
    ours, theirs = load(half), load(whole)
    for checkpoint in (ours, theirs):
        for name in ("config", "log_length"):
            del checkpoint[name]
    assert_same(ours, theirs)


def test_resuming_with_another_micro_batch_goes_on_in_the_same_data(run, tmp_path):
    whole = run(tmp_path / "whole", dtype="float64")
    run(tmp_path / "half", dtype="float64", max_iters=3, lr_decay_iters=6)
    records = run(tmp_path / "half", dtype="float64", init_from="resume", batch_size=2,
                  gradient_accumulation_steps=4)
    for ours, theirs in zip(of_kind(records, "train"), of_kind(whole, "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    final, expected = load(tmp_path / "half")["model"], load(tmp_path / "whole")["model"]
    assert largest_difference(dict(final), dict(expected)) < 1e-10


def test_the_log_is_cut_even_if_nothing_was_written_since(tmp_path):
    """A run resumed at step 10 and stopped before its next record keeps the right length."""
    config = train.TrainConfig(out_dir=str(tmp_path))
    log = train.Log(config, None)
    log.record("train", 0, loss=1.0)
    length = log.length()
    log.record("train", 15, loss=2.0)
    assert train.Log(config, length).length() == length


def test_a_finished_run_can_be_prolonged(run, tmp_path):
    run(tmp_path, max_iters=3, schedule="constant")
    records = run(tmp_path, max_iters=6, schedule="constant", init_from="resume")
    assert [r["iter"] for r in of_kind(records, "train")] == [0, 1, 2, 3, 4, 5]
    again = run(tmp_path, max_iters=6, schedule="constant", init_from="resume")
    assert again == records  # nothing left to do


@pytest.mark.parametrize("step", [1, 2, 5])
def test_after_a_signal_the_run_goes_on_as_if_undisturbed(run, tmp_path, monkeypatch, step):
    """The signal comes in the step before the save; after 2 and 5 an evaluation is due."""
    def stop_here(now, config, multiplier=train.lr_multiplier):
        if now == step and config.init_from == "scratch" and config.out_dir.endswith("half"):
            os.kill(os.getpid(), signal.SIGTERM)
        return multiplier(now, config)

    monkeypatch.setattr(train, "lr_multiplier", stop_here)
    handler = signal.getsignal(signal.SIGTERM)
    whole = run(tmp_path / "whole", dropout=0.1)
    run(tmp_path / "half", dropout=0.1)
    assert load(tmp_path / "half")["iter_num"] == step + 1
    assert signal.getsignal(signal.SIGTERM) is handler
    records = run(tmp_path / "half", dropout=0.1, init_from="auto")
    assert_same(load(tmp_path / "half")["model"], load(tmp_path / "whole")["model"])
    assert without_times(records) == without_times(whole)


def test_sigterm_to_a_program(run, words, tmp_path):
    options = dict(template="nesterov", dropout=0.1, schedule="constant", eval_interval=10**6)
    log = tmp_path / "half" / "log.jsonl"
    command = [sys.executable, "train.py", *words(tmp_path / "half", **options, max_iters=10**6)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and '"iter": 3' in log.read_text()):
            time.sleep(0.005)
        process.terminate()
        out = process.communicate()[0]
    assert process.returncode == 0 and "stopped by a signal" in out
    options["max_iters"] = load(tmp_path / "half")["iter_num"] + 3
    records = run(tmp_path / "half", **options, init_from="resume")
    expected = run(tmp_path / "whole", **options)
    assert without_times(records[1:]) == without_times(expected[1:])
    assert_same(load(tmp_path / "half")["model"], load(tmp_path / "whole")["model"])


def test_torchruns_restart_of_a_refused_run_is_refused(run, tmp_path, monkeypatch):
    """As torchrun --max-restarts starts it again; its store outlives the attempts."""
    run(tmp_path / "old", max_iters=3)
    before = (tmp_path / "old" / "ckpt.pt").read_bytes()
    store = train.dist.HashStore()
    monkeypatch.setattr(train.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="localhost",
                            MASTER_PORT=0, TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))

    def attempt(out, **options):
        try:
            return of_kind(run(tmp_path / out, **options), "train")
        finally:
            if train.dist.is_initialized():
                train.dist.destroy_process_group()

    for count in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        refused(lambda: attempt("old"), "--overwrite")
    assert (tmp_path / "old" / "ckpt.pt").read_bytes() == before
    attempt("new", max_iters=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert [r["iter"] for r in attempt("new")] == [0, 1, 2, 3, 4, 5]


def test_torchruns_restart_resumes(run, tmp_path, monkeypatch):
    run(tmp_path, max_iters=3)
    refused(lambda: run(tmp_path), "--overwrite")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [r["iter"] for r in of_kind(run(tmp_path), "train")] == [0, 1, 2, 3, 4, 5]


def test_auto_resumes_if_it_can(run, tmp_path):
    run(tmp_path, max_iters=3, init_from="auto")
    assert load(tmp_path)["iter_num"] == 3
    records = run(tmp_path, init_from="auto")
    assert [r["iter"] for r in of_kind(records, "train")] == [0, 1, 2, 3, 4, 5]
    refused(lambda: run(tmp_path / "new", init_from="resume"), "nothing to resume", "new")


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_damaged_checkpoint_falls_back_on_the_previous(run, tmp_path, capsys, share):
    run(tmp_path)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[:int(share * len(whole))])
    run(tmp_path, init_from="resume")
    warning = capsys.readouterr().err
    assert "ckpt.pt is damaged" in warning and "ckpt_prev.pt" in warning
    assert load(tmp_path)["iter_num"] == 6
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(b"no zip file")
    lines = refused(lambda: run(tmp_path, init_from="resume"), "/ckpt.pt", "/ckpt_prev.pt")
    assert len(lines) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_full_disk_leaves_the_checkpoint_whole(run, tmp_path, monkeypatch, error):
    run(tmp_path, max_iters=3)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def half(state, file):
        file.write(before[:1000])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        (line,) = refused(lambda: run(tmp_path, init_from="resume"), "ckpt.pt", "intact")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.partial*"))
    run(tmp_path, init_from="resume")
    assert load(tmp_path)["iter_num"] == 6 and load(tmp_path, "ckpt_prev.pt")["iter_num"] == 3


def test_a_used_folder_needs_overwrite(run, tmp_path):
    run(tmp_path, max_iters=3)
    before = (tmp_path / "ckpt.pt").read_bytes()
    refused(lambda: run(tmp_path), str(tmp_path), "--overwrite", "--init_from=resume")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    records = run(tmp_path, "--overwrite", max_iters=2, eval_interval=9)
    assert [r["iter"] for r in of_kind(records, "train")] == [0, 1]
    assert {p.name for p in tmp_path.glob("*.pt")} == {"ckpt.pt", "best.pt"}  # no old ckpt_prev.pt


def test_what_overwrite_replaces_survives_a_run_that_cannot_start(run, tmp_path, monkeypatch):
    run(tmp_path, max_iters=3)
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(lambda: run(tmp_path, "--overwrite", "--wandb_log"), "pip install wandb")
    assert load(tmp_path)["iter_num"] == 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + 2 + 3


def test_a_second_run_is_kept_out_while_the_first_lives(run, tmp_path, monkeypatch):
    tried = []

    def meanwhile(now, config, multiplier=train.lr_multiplier):
        if now == 1 and not tried:
            tried.append(True)
            refused(lambda: run(tmp_path), "another run", str(tmp_path))
        return multiplier(now, config)

    monkeypatch.setattr(train, "lr_multiplier", meanwhile)
    records = run(tmp_path)
    assert tried and [r["iter"] for r in of_kind(records, "train")] == [0, 1, 2, 3, 4, 5]
    run(tmp_path, "--overwrite")  # the lock is gone


# -----------------------------------------------------------------------------
# Other weights, other data, nanoGPT's checkpoints


def test_weights_of_a_file_start_a_fresh_run(run, tmp_path, data_dir):
    """On other data, with the file's architecture, from step 0."""
    run(tmp_path / "a", template="nesterov")
    last = run(tmp_path / "b", dataset="edge", init_from=tmp_path / "a" / "ckpt.pt", max_iters=1)
    model = load(tmp_path / "b")["model_args"]
    assert model["template"] == "nesterov" and load(tmp_path / "b")["tokens_seen"] == 128
    assert [r["iter"] for r in last[1:]] == [0, 0, 1]
    tiny = run(tmp_path / "c", init_from=tmp_path / "a" / "ckpt.pt", max_iters=1)
    assert tiny[1]["val_loss"] == load(tmp_path / "a")["best_val_loss"]
    assert tiny[1]["val_loss"] != last[1]["val_loss"]


def test_a_context_can_be_cropped(run, tmp_path):
    run(tmp_path / "a", template="nesterov")
    run(tmp_path / "b", init_from=tmp_path / "a" / "ckpt.pt", block_size=8, max_iters=2)
    args = load(tmp_path / "b")["model_args"]
    assert args["block_size"] == 8 and load(tmp_path / "b")["tokens_seen"] == 2 * 8 * 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_context_can_be_cropped_when_resuming(run, tmp_path, optimizer):
    """The optimiser's state of the position tables is cut with them."""
    options = dict(template="nesterov", optimizer=optimizer)
    run(tmp_path, max_iters=3, **options)
    run(tmp_path, init_from="resume", block_size=8, **options)
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == 6 and checkpoint["model_args"]["block_size"] == 8
    for name, state in checkpoint["optimizer"]["adamw"].items():
        assert state["exp_avg"].shape == checkpoint["model"][name].shape, name


def test_what_is_printed_and_logged_is_the_models(words, tmp_path, run, capsys):
    """Also where the shape comes from a checkpoint, not from options."""
    run(tmp_path / "a")
    unsaid = {f"--{name}=" for name in ("n_layer", "n_head", "n_embd", "block_size")}
    argv = [word for word in words(tmp_path / "b", init_from=tmp_path / "a" / "ckpt.pt",
                                   max_iters=1, eval_iters=3)
            if not any(word.startswith(name) for name in unsaid)]
    capsys.readouterr()
    train.main(argv)
    out = capsys.readouterr().out
    assert "128 tokens = 2 micro-batches of 4 x 16" in out
    assert "eval_tokens = 192" in out  # 3 batches of 4 x 16
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["block_size"]) == (2, 32, 16)


def test_other_data_is_refused(run, tmp_path):
    run(tmp_path / "a", max_iters=3)
    write_data(tmp_path / "data" / "tiny", np.zeros(343), np.zeros(300))  # the same name and size
    refused(lambda: run(tmp_path / "a", init_from="resume", data_dir=tmp_path / "data"),
            "not the data", "--init_from=")
    refused(lambda: run(tmp_path / "a", init_from="resume", dataset="edge"), "edge")
    write_data(tmp_path / "data" / "char", np.zeros(343), vocab_size=2, tokenizer="char",
               alphabet="ab")
    for source in ("resume", tmp_path / "a" / "ckpt.pt"):
        refused(lambda source=source: run(tmp_path / "a", "--overwrite", init_from=source,
                                          data_dir=tmp_path / "data", dataset="char"),
                "another tokenizer", "bytes")
    assert load(tmp_path / "a")["iter_num"] == 3


def test_openais_weights_ask_for_their_tokenizer(run, tmp_path):
    refused(lambda: run(tmp_path / "a", init_from="gpt2"), "another tokenizer", "gpt2")
    assert not (tmp_path / "a").exists()


def test_nanogpts_and_our_gpt2_data_have_the_same_tokenizer(run, tmp_path, monkeypatch):
    """A model of the one may be trained on the other."""
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)
    write_data(tmp_path / "ours", np.arange(343), vocab_size=50257, padded_vocab_size=50304,
               tokenizer="gpt2")
    write_data(tmp_path / "theirs", np.arange(343))
    (tmp_path / "theirs" / "meta.json").unlink()
    options = dict(data_dir=tmp_path, n_embd=4, n_layer=1, max_iters=1)
    run(tmp_path / "a", dataset="ours", **options)
    run(tmp_path / "b", dataset="theirs", init_from=tmp_path / "a" / "ckpt.pt", **options)
    assert load(tmp_path / "b")["model_args"]["vocab_size"] == 50304
    assert load(tmp_path / "b")["model_args"]["vocab_used"] == 50257


def test_another_architecture_is_refused(run, tmp_path):
    run(tmp_path, max_iters=3)
    lines = refused(lambda: run(tmp_path, init_from="resume", n_layer=3, template="nesterov"),
                    "n_layer=3", "n_layer=2", "template=nesterov", "template=gd")
    assert len(lines) == 2
    run(tmp_path, init_from="resume", dropout=0.1)  # dropout may change, as in nanoGPT


def test_options_of_a_newer_version_are_named(run, tmp_path):
    run(tmp_path, max_iters=3)
    checkpoint = load(tmp_path)
    checkpoint["model_args"]["n_experts"] = 8
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    refused(lambda: run(tmp_path, init_from="resume"), "n_experts")


def nanogpt_checkpoint(path, iter_num=4):
    """As nanoGPT's train.py saves one: compiled, 7 model_args, a numbered optimiser state. The
    moments of parameter i are filled with 100 (i + 1)."""
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=257,
                dropout=0.0)
    torch.manual_seed(3)
    model = GPT(GPTConfig(**args))
    named = list(model.named_parameters())
    order = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    shapes = dict(named)
    state = {i: {"step": torch.tensor(4.0), **{moment: torch.full_like(shapes[n], 100.0 * (i + 1))
                                               for moment in ("exp_avg", "exp_avg_sq")}}
             for i, n in enumerate(order)}
    split = sum(p.dim() >= 2 for _, p in named)
    groups = [{"params": list(range(split)), "weight_decay": 0.1, "lr": 1e-3},
              {"params": list(range(split, len(order))), "weight_decay": 0.0, "lr": 1e-3}]
    torch.save({
        "model": {f"_orig_mod.{k}": w for k, w in model.state_dict().items()},
        "optimizer": {"state": state, "param_groups": groups}, "model_args": args,
        "iter_num": iter_num, "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "tiny", "out_dir": "out", "learning_rate": 1e-3}}, path)
    return model, {n: 100.0 * (i + 1) for i, n in enumerate(order)}


def test_a_nanogpt_checkpoint_resumes(run, tmp_path):
    model, moments = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    records = run(tmp_path, init_from="resume", max_iters=5, bias=True, eval_interval=5)
    assert [(r["type"], r["iter"]) for r in records if "iter" in r] == [("train", 4), ("eval", 5)]
    assert records[-1]["best_val_loss"] == 2.5
    for name, state in load(tmp_path)["optimizer"]["adamw"].items():
        assert state["step"] == 5
        old = moments[name] * torch.ones(())
        assert torch.allclose(state["exp_avg"], 0.9 * old, atol=1.0), name
        assert torch.allclose(state["exp_avg_sq"], 0.95 * old, atol=1.0), name
    assert largest_difference(dict(model.state_dict()), dict(load(tmp_path)["model"])) < 0.1


def test_the_log_of_a_resumed_nanogpt_run_has_its_config_first(run, tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    records = run(tmp_path, init_from="resume", max_iters=5, bias=True)
    assert records[0]["type"] == "config" and len(of_kind(records, "config")) == 1


@pytest.mark.parametrize("options, warned", [
    (dict(optimizer="muon"), "optimiser"), (dict(dtype="float16"), None)])
def test_a_nanogpt_checkpoint_with_other_options(run, tmp_path, capsys, options, warned):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    run(tmp_path, init_from="resume", max_iters=5, bias=True, **options)
    assert load(tmp_path)["iter_num"] == 5
    assert warned is None or f"warning: the checkpoint's {warned}" in capsys.readouterr().out


def test_resuming_in_another_precision(run, tmp_path):
    """Also in fp16, whose scaler the checkpoint does not have."""
    run(tmp_path, max_iters=3)
    run(tmp_path, init_from="resume", dtype="float16")
    run(tmp_path, init_from="resume", dtype="bfloat16", max_iters=7)
    assert load(tmp_path)["iter_num"] == 7


# -----------------------------------------------------------------------------
# Logs


def test_the_log(run, tmp_path):
    records = run(tmp_path, max_iters=5, eval_interval=2, log_interval=2, eval_iters=2)
    config = records[0]
    assert config["type"] == "config" and config["n_layer"] == 2 and config["eval_tokens"] == 128
    assert {f"{f}" for f in train.TrainConfig.__dataclass_fields__} == config.keys() - {"type"}
    assert [(r["type"], r["iter"]) for r in records[1:]] == [
        ("eval", 0), ("train", 0), ("eval", 2), ("train", 2), ("eval", 4), ("train", 4),
        ("eval", 5)]
    for r in of_kind(records, "train"):
        assert r["tokens"] == (r["iter"] + 1) * 128 and r["tokens_per_s"] > 0 and r["mfu"] is None
        assert 4 < r["loss"] < 7 and r["grad_norm"] > 0 and 0 < r["lr"] <= 1e-3
    for r in of_kind(records, "eval"):
        assert r["tokens"] == r["iter"] * 128 and 4 < r["best_val_loss"] <= r["val_loss"] < 7
    beside = json.loads((tmp_path / "config.json").read_text())
    assert {"type": "config", **beside} == config


def test_the_options_are_printed(run, tmp_path, capsys):
    run(tmp_path, eval_iters=3, max_iters=1)
    out = capsys.readouterr().out
    assert "n_embd = 32" in out and "eval_tokens = 192" in out and "33,472 parameters" in out
    assert "128 tokens = 2 micro-batches of 4 x 16" in out


def test_the_loss_curve(run, pictures, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    run(tmp_path)
    pixels = image.imread(tmp_path / "loss.png")[..., :3]
    coloured = np.ptp(pixels, axis=-1) > 0.3
    assert min(pixels.shape[:2]) > 200 and (pixels == 1).all(axis=-1).mean() > 0.5
    assert coloured.sum() > 200  # the curves, not only axes and letters


def test_several_runs_in_one_picture(run, tmp_path):
    """Each in its own colour, the second curve in matplotlib's second, #ff7f0e."""
    image = pytest.importorskip("matplotlib.image")
    orange = []
    for name in ("a", "b"):
        run(tmp_path / name)
        train.plot_losses([tmp_path / n for n in ("a", "b")[:len(orange) + 1]], tmp_path / "x.png")
        pixels = image.imread(tmp_path / "x.png")[..., :3]
        orange.append((abs(pixels - np.array([255, 127, 14]) / 255).max(axis=-1) < 0.05).sum())
    assert orange[0] == 0 and orange[1] > 100


def test_no_curve_without_matplotlib(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    run(tmp_path, max_iters=1)
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("option, module", [("wandb_log", "wandb"),
                                            ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_logger_is_one_line(run, tmp_path, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    (line,) = refused(lambda: run(tmp_path, f"--{option}"), "pip install")
    assert module.split(".")[-1] in line


# -----------------------------------------------------------------------------
# What a user does wrong


@pytest.mark.parametrize("spoil, said", [
    (lambda c: c.pop("iter_num"), "no run to resume"),
    (lambda c: c["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight"),
    (lambda c: c["optimizer"]["adamw"]["transformer.h.0.attn.c_attn.weight"].update(
        exp_avg=torch.zeros(2, 2)), "transformer.h.0.attn.c_attn.weight")])
def test_a_checkpoint_that_lacks_something_is_refused(run, tmp_path, spoil, said):
    run(tmp_path, max_iters=3)
    checkpoint = load(tmp_path)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    refused(lambda: run(tmp_path, init_from="resume"), said)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError()], ids=["cuda", "mps", "cpu", "python"])
def test_out_of_memory_says_what_to_halve(run, tmp_path, monkeypatch, error):
    run(tmp_path / "run", max_iters=1)

    def too_large(*_, **__):
        raise error

    monkeypatch.setattr(GPT, "forward", too_large)
    refused(lambda: run(tmp_path / "new"), "halve --batch_size", "--gradient_accumulation_steps")
    refused(lambda: sample.main([f"--out_dir={tmp_path}/run"]), "halve --num_samples")
    refused(lambda: bench.main(["speed", "--device=cpu", "--n_layer=1", "--n_embd=12",
                                "--block_size=8", "--vocab_size=32"]), "halve --batch_size")


def test_other_errors_keep_their_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(tmp_path)


@pytest.mark.parametrize("card, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
    ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Unknown", None)])
def test_only_known_cards_have_a_peak(monkeypatch, card, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert train.peak_flops(torch.device("cuda", 0)) == peak


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_other_logs_get_the_same_numbers(run, tmp_path, monkeypatch, kind):
    """Only numbers: a CPU has no mfu, and tensorboard cannot take None."""
    seen = []
    take = SimpleNamespace(log=lambda values, step: seen.extend(
        (name, float(value), step) for name, value in values.items()),
        add_scalar=lambda name, value, step: seen.append((name, float(value), step)),
        flush=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: take))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=lambda folder: take))
    options = {"wandb": dict(wandb_log=True), "tensorboard": dict(tensorboard=True)}[kind]
    records = run(tmp_path, template="polyak", **options)
    for name in ("beta", "gamma"):
        means = [(pytest.approx(np.mean(r["scalars"][name])), r["iter"]) for r in records
                 if r["type"] == "eval"]
        assert means == [row[1:] for row in seen if row[0] == f"scalars/{name}"]
    losses = [(f"{r['type']}/{k}", r[k], r["iter"]) for r in records
              for k in ("loss", "val_loss") if k in r]
    assert losses == [row for row in seen if row[0] in ("train/loss", "eval/val_loss")]
    assert not [row for row in seen if row[0] == "train/mfu"]


def test_resuming_with_other_options_says_so(run, tmp_path, capsys):
    run(tmp_path, max_iters=3)
    run(tmp_path, init_from="resume", learning_rate=2e-3)
    assert "learning_rate = 0.002 (was 0.001)" in capsys.readouterr().out


@pytest.mark.parametrize("option", [dict(vocab_size=512), dict(block_size=32)])
def test_a_shape_that_the_checkpoint_cannot_take_is_refused(run, tmp_path, option):
    run(tmp_path, max_iters=3)
    (name, value), = option.items()
    refused(lambda: run(tmp_path, init_from="resume", **option), f"{name}={value}", "checkpoint")


def test_when_fp16_overflows_no_optimiser_steps(run, tmp_path, monkeypatch):
    """Muon's matrices overflow, the tables do not: neither may move, decay or gather momentum."""
    def overflow(parameters, *_):
        parameters = list(parameters)
        parameters[-2].grad.fill_(torch.inf)
        return torch.tensor(torch.inf)

    run(tmp_path, max_iters=2, dtype="float16", optimizer="muon", save_interval=1)
    before = load(tmp_path)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    run(tmp_path, max_iters=3, dtype="float16", optimizer="muon", init_from="resume")
    after = load(tmp_path)
    assert after["iter_num"] == 3
    assert_same(after["model"], before["model"])
    assert_same(after["optimizer"], before["optimizer"])


def in_this_process(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stop:
        cli(train.main)
    return stop.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("options, said", [
    (dict(n_layr=3), ["unknown option n_layr", "n_layer"]),
    (dict(n_layer="many"), ["n_layer=many", "integer"]),
    (dict(n_head=3), ["n_embd=32, n_head=3", "multiple"]),
    (dict(dataset="nowhere"), ["nowhere", "prepare.py"]),
    (dict(block_size=500), ["343 tokens", "block_size=500", "501"]),
    (dict(block_size=320), ["300 tokens", "block_size=320"]),
    (dict(vocab_size=100), ["257", "100"]),
    (dict(init_from="no.pt"), ["no checkpoint no.pt"]),
    (dict(learning_rate=1e38, warmup_iters=0), ["loss is nan", "learning rate"]),
    pytest.param(dict(device="cuda"), ["cuda", "--device=cpu"], marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is CUDA")),
    (dict(device="gpu"), ["device=gpu", "cpu"]),
    (dict(backend="carrier"), ["backend=carrier", "nccl | gloo"]),
    (dict(n_head=0), ["n_head=0", "at least 1"]),
    (dict(vocab_used=100), ["vocab_used=100", "data"]),
    (dict(seed=-1), ["seed=-1", "negative"]),
], ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "")
def test_a_mistake_is_one_line(words, tmp_path, monkeypatch, capsys, options, said):
    code, lines = in_this_process(words(tmp_path, **options), monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in said), lines


def test_all_mistakes_come_together(words, tmp_path, monkeypatch, capsys):
    code, lines = in_this_process(words(tmp_path, n_layer=0, batch_size=0, template="tmn"),
                                  monkeypatch, capsys)
    assert code == 2
    assert any("tmm" in line for line in lines)  # the nearest name
    code, lines = in_this_process(words(tmp_path, n_layer=0, batch_size=0, dropout=1),
                                  monkeypatch, capsys)
    assert code == 2 and len(lines) == 3


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_that_cannot_start_leaves_no_folder(run, tmp_path, monkeypatch, locks):
    """Also where there are no locks, on Windows."""
    if not locks:
        monkeypatch.setattr("config.fcntl", None)
    refused(lambda: run(tmp_path / "new", dataset="nowhere"), "nowhere")
    refused(lambda: run(tmp_path / "new", init_from="resume"), "nothing to resume")
    refused(lambda: run(tmp_path / "new", "--eval_only", dataset="nowhere"), "nowhere")
    assert not (tmp_path / "new").exists()


def test_an_out_dir_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (line,) = refused(lambda: run(tmp_path / "file"), str(tmp_path / "file"))


def test_accumulation_must_divide_by_the_processes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(lambda: run(tmp_path, gradient_accumulation_steps=6), "gradient_accumulation_steps=6",
            "4 processes")


def test_a_program_ends_with_code_2_and_no_traceback(words, tmp_path):
    command = [sys.executable, "train.py", *words(tmp_path, n_layr=3, batch_size=0.5)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert [line[:7] for line in process.stderr.splitlines()] == ["error: ", "error: "]


# -----------------------------------------------------------------------------
# Compilation


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))),
                    reason="no C++ compiler for torch.compile")
def test_compiled_training_is_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)  # another graph to compile
    options = dict(template="nesterov", n_layer=1, max_iters=2)
    eager = of_kind(run(tmp_path / "eager", **options), "train")
    compiled = of_kind(run(tmp_path / "compiled", "--compile", **options), "train")
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert load(tmp_path / "compiled")["model"].keys() == load(tmp_path / "eager")["model"].keys()


def test_where_compilation_fails(run, tmp_path, monkeypatch, capsys):
    def fails(function):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=4, block_size=4))
    assert train.try_compile(model, None, torch.device("cuda")) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert "not compiled" in line and line.endswith("no compiler")
    (line,) = refused(lambda: run(tmp_path, "--compile"), "no compiler", "--compile=False")
    run(tmp_path)  # auto on a CPU and False never try
    assert train.try_compile(model, False, torch.device("cuda")) is False
