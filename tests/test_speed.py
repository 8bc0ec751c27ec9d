"""The fast paths against plain computations: rows of different lengths and reused caches against
full forward passes, compiled steps against eager ones, matrices stored in bf16 against autocast,
the head and loss in chunks against autograd on F.cross_entropy, draws against their definition.
"""

import contextlib
import gc
import itertools
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks
from test_model import IDX, VARIANTS, assert_close, build, every_variant, logits
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import GPT, TEMPLATES, ChunkedCrossEntropy, KVCache, Linear, draw
from support.errors import cli

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
LENGTHS = (1, 5, 12, 30, 9, 13)  # block_size is 12
FEW = ("gpt", "nesterov-lie_trotter", "tmm-strang", "imex-2", "llama", "hourglass-lie_trotter")
MORE = (*FEW, "gpt-qk_norm-rope", "gd-add", "symplectic", "adamw", "tmm-hourglass-each")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts_of(lengths, seed=0):
    gen = seeded(seed)
    return [torch.randint(48, (n,), generator=gen) for n in lengths]


def padded(prompts, width=0, seed=1):
    """The rows, filled up with arbitrary ids, and their lengths."""
    idx = torch.randint(48, (len(prompts), max(width, *map(len, prompts))), generator=seeded(seed))
    for row, prompt in zip(idx, prompts, strict=True):
        row[: len(prompt)] = prompt
    return idx, torch.tensor([len(prompt) for prompt in prompts])


@torch.no_grad()
def greedy(model, prompt, n, stops=()):
    """n tokens after one prompt, each by a full forward over its window: when that is full, its
    older half is dropped. What follows a stop token is that token again."""
    room = model.config.block_size
    window, out = prompt.tolist()[-room:], []
    for _ in range(n):
        if len(window) > room:
            window = window[-max(1, room // 2):]
        if not (out and out[-1] in stops):
            token = model(torch.tensor([window]))[0][0, -1].argmax().item()
        out.append(token)
        window.append(token)
    return torch.tensor(out)


def continuations(model, idx, n, **how):
    return model.generate(idx, n, **{"temperature": 0, **how})[:, idx.size(1):]


# -----------------------------------------------------------------------------
# Rows of different lengths


@pytest.mark.parametrize("name", MORE)
def test_a_row_does_not_depend_on_the_others(name):
    """Short ones, ones that fill the context and longer ones; all run past it."""
    model, prompts = build(**VARIANTS[name]), prompts_of(LENGTHS)
    expected = torch.stack([greedy(model, prompt, 15) for prompt in prompts])
    for width, seed in ((0, 1), (40, 2)):  # another padding, and one that no row needs
        idx, lengths = padded(prompts, width, seed)
        before = idx.clone(), lengths.clone()
        assert torch.equal(continuations(model, idx, 15, lengths=lengths), expected)
        assert torch.equal(idx, before[0]) and torch.equal(lengths, before[1])
    for prompt, row in zip(prompts, expected, strict=True):
        assert torch.equal(continuations(model, prompt[None], 15)[0], row)


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 64])
def test_rows_of_different_lengths_in_every_context(block_size):
    """Down to one token; 64 is never full."""
    model, prompts = build(bias=True, block_size=block_size), prompts_of((1, 2, 9, 7, 3, 8))
    idx, lengths = padded(prompts)
    out = continuations(model, idx, 25, lengths=lengths)
    assert torch.equal(out, torch.stack([greedy(model, prompt, 25) for prompt in prompts]))


@pytest.mark.parametrize("name", ["gpt", "nesterov-hourglass"])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (12, 1), (13, 12, 11), (3, 2), (25, 24)])
def test_few_rows_of_different_lengths(name, lengths):
    model, prompts = build(**VARIANTS[name]), prompts_of(lengths, 3)
    idx, counts = padded(prompts)
    for n in (1, 14):
        out = continuations(model, idx, n, lengths=counts)
        assert torch.equal(out, torch.stack([greedy(model, prompt, n) for prompt in prompts]))


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_stop_tokens_with_rows_of_different_lengths(name):
    """Also where the padding is of stop tokens."""
    model, prompts = build(**VARIANTS[name]), prompts_of(LENGTHS)
    free = torch.stack([greedy(model, prompt, 16) for prompt in prompts])
    common = free.flatten().bincount().argsort(descending=True)
    most_rows = max(free.unique().tolist(), key=lambda t: (free == t).any(1).sum())
    ends = tuple(free[:, 9].unique().tolist())  # every row has met one after ten tokens
    for stops in ((most_rows,), tuple(common[:3].tolist()), ends):
        expected = torch.stack([greedy(model, prompt, 16, stops) for prompt in prompts])
        met = torch.isin(expected, torch.tensor(stops))
        width = 16 if not met.any(1).all() else met.int().argmax(1).max() + 1
        idx, lengths = padded(prompts)
        for row, n in zip(idx, lengths, strict=True):
            row[n:] = stops[0]
        out = continuations(model, idx, 16, lengths=lengths, stop_tokens=stops)
        assert torch.equal(out, expected[:, :width])
    assert width <= 10


@pytest.mark.parametrize("how", [dict(), dict(top_k=5), dict(top_p=0.8), dict(temperature=2.0)])
def test_padding_changes_no_draw(how):
    model, prompts = build(**VARIANTS["nesterov-llama"]), prompts_of(LENGTHS)
    outs = []
    for width, seed in ((0, 1), (0, 2), (50, 3)):
        idx, lengths = padded(prompts, width, seed)
        outs.append(continuations(model, idx, 20, lengths=lengths, generator=seeded(),
                                  **{"temperature": 1.0, **how}))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    idx = torch.stack(prompts_of((5, 5, 5)))
    one, two = (continuations(model, idx, 20, temperature=1.0, generator=seeded(), lengths=n)
                for n in (None, torch.tensor([5, 5, 5])))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_ids_of_either_width(kind):
    """int32 ids, which nn.Embedding takes, are continued as int64 ones are."""
    model = build(bias=True)
    out = model.generate(IDX[:, :5].to(kind), 9, temperature=0)
    assert out[:, 5:].tolist() == [greedy(model, row[:5], 9).tolist() for row in IDX]


# -----------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("name", ["gpt", "nesterov-llama", "hourglass-strang"])
def test_a_cache_can_be_used_anew(name):
    """After rows of other lengths, after the context was full, and after a stream left midway."""
    model, cache = build(**VARIANTS[name]), KVCache(12)
    for seed, lengths in enumerate([(12, 5, 9, 13), (4, 2, 1, 3), (30, 1, 12, 5), (1, 1, 1, 1)]):
        prompts = prompts_of(lengths, seed)
        idx, counts = padded(prompts)
        expected = torch.stack([greedy(model, prompt, 15) for prompt in prompts])
        assert torch.equal(continuations(model, idx, 15, lengths=counts, cache=cache), expected)
        assert torch.equal(continuations(model, idx, 15, lengths=counts, cache=KVCache(12)),
                           expected)
        left = model.stream(idx, 15, temperature=0, lengths=counts, cache=cache)
        assert torch.equal(torch.stack(list(itertools.islice(left, 3)), 1), expected[:, :3])


def test_a_cache_may_be_larger_and_just_large_enough():
    model, expected = build(bias=True), greedy(build(bias=True), IDX[0, :4], 6)
    for size in (9, 10, 12, 100):  # the last token drawn is not read
        out = continuations(model, IDX[:1, :4], 6, cache=KVCache(size))
        assert torch.equal(out[0], expected)


@pytest.mark.parametrize("name", ["gpt", "nesterov-llama"])
def test_too_small_a_cache_is_refused(name):
    """At the prompt or at a later token; and it serves what fits afterwards."""
    model, cache = build(**VARIANTS[name]), KVCache(6)
    idx, lengths = padded(prompts_of((3, 7)))
    with pytest.raises(ValueError, match="room for 6"):
        model.generate(idx, 2, cache=cache, lengths=lengths)
    with pytest.raises(ValueError, match="room for 6"):
        model.generate(IDX[:, :4], 8, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="room for 6"):
        model(IDX[:, :7], cache=KVCache(6))
    with torch.no_grad(), pytest.raises(ValueError, match="room for 12"):
        model(IDX.repeat(1, 2)[:, :13], cache=KVCache(20))
    with pytest.raises(ValueError, match="room for 12"):
        model(IDX.repeat(1, 2)[:, :13])
    out = continuations(model, IDX[:, :2], 4, cache=cache)
    assert out.tolist() == [greedy(model, row[:2], 4).tolist() for row in IDX]


def test_a_cache_can_be_used_anew_after_a_pass_that_broke_off():
    """As Ctrl-C does it, behind one of two attention calls, in the prompt or in a step."""
    model, cache = build(bias=True), KVCache(12)
    idx, others = torch.stack(prompts_of((4, 4), 5)), torch.stack(prompts_of((4, 4), 6))
    expected = torch.stack([greedy(model, row, 6) for row in others])
    for passes in (0, 2):
        stream = model.stream(idx, 6, temperature=0, cache=cache)
        for _ in range(passes):
            next(stream)

        def stop(*_):
            raise KeyboardInterrupt

        hook = model.transformer.h[0].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        hook.remove()
        assert torch.equal(continuations(model, others, 6, cache=cache), expected)


@pytest.mark.parametrize("ours, theirs", [(1, 3), (3, 1), (2, 3)])
def test_a_cache_of_other_rows_is_refused_or_serves(ours, theirs):
    """Its tensors have a row each: another number of rows must not give wrong tokens silently."""
    model, cache = build(bias=True), KVCache(12)
    continuations(model, torch.stack(prompts_of([4] * theirs, 5)), 3, cache=cache)
    idx = torch.stack(prompts_of([4] * ours, 6))
    try:
        out = list(model.stream(idx, 3, temperature=0, cache=cache))
    except (ValueError, RuntimeError, IndexError):
        return
    assert torch.stack(out, 1).tolist() == [greedy(model, row, 3).tolist() for row in idx]


@pytest.mark.parametrize("name", MORE)
@torch.no_grad()
def test_a_chunk_behind_rows_of_different_lengths(name):
    """Every position of a chunk of several tokens, against full forwards of each row alone."""
    model, rows, cache = build(**VARIANTS[name]), prompts_of((12, 9, 7, 11)), KVCache(12)
    starts = torch.tensor([7, 4, 2, 6])
    idx, _ = padded([row[:n] for row, n in zip(rows, starts, strict=True)])
    first = model(idx, cache=cache, last=starts - 1)[0]
    cache.lengths.copy_(starts)
    for i, row in enumerate(rows):
        assert_close(first[i, 0], model(row[None, :starts[i]])[0][0, 0], 1e-12)
    for size in (3, 2):  # as many as fit
        chunk = torch.stack([row[n:n + size] for row, n in zip(rows, starts, strict=True)])
        out = model(chunk, targets=chunk, cache=cache)[0]
        for i, row in enumerate(rows):
            full = logits(model, row[None, :starts[i] + size])
            assert_close(out[i], full[0, starts[i]:], 1e-12)
        starts = starts + size
        assert torch.equal(cache.lengths, starts)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_last_picks_a_position_of_each_row(name):
    model, idx = build(**VARIANTS[name]), torch.stack(prompts_of([10] * 4))
    full = logits(model, idx)
    for last in ([0, 9, 4, 4], [9, 9, 9, 9], [0, 0, 0, 0], [3, 1, 8, 2]):
        out, loss = model(idx, last=torch.tensor(last))
        assert loss is None and out.shape == (4, 1, 48)
        assert_close(out[:, 0], torch.stack([full[i, n] for i, n in enumerate(last)]), 1e-12)
        cached = model(idx, last=torch.tensor(last), cache=KVCache(12))[0]
        assert_close(cached, out, 1e-12)
    assert_close(model(idx)[0], full[:, -1:], 1e-12)


# -----------------------------------------------------------------------------
# Compiled steps


@pytest.fixture
def dynamo():
    """Nothing remembered from other models, no fallback to eager."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.disable()
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        yield torch._dynamo.utils.counters
    gc.enable()
    torch._dynamo.reset()


def one_graph(name, counters):
    """While lengths grow, over a full context, and for other prompts with the same cache."""
    model, cache = build(torch.float32, **dict(VARIANTS[name], n_layer=1, ffn_depth=2)), KVCache(12)
    for seed, lengths in enumerate([(2, 5, 1), (9, 3, 14), (4, 4, 4)]):
        prompts = prompts_of(lengths, seed)
        idx, counts = padded(prompts)
        out = continuations(model, idx, 20, lengths=counts, cache=cache, compile=True)
        assert torch.equal(out, torch.stack([greedy(model, prompt, 20) for prompt in prompts]))
        assert torch.equal(out, continuations(model, idx, 20, lengths=counts))
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.fixture
def no_kernels(dynamo, monkeypatch):
    """Without the C++ compiler, which takes a second for each kernel."""
    def compiled(model, fullgraph, dynamic, mode, wrapped=torch.compile):
        return wrapped(model, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiled)
    return dynamo


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "llama", "hourglass-strang"])
def test_all_steps_are_one_graph(name, no_kernels):
    one_graph(name, no_kernels)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))),
                    reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("name", ["gpt", "nesterov-llama"])
def test_compiled_steps_equal_eager_ones(name, dynamo):
    one_graph(name, dynamo)


def test_compiled_steps_of_one_row(no_kernels):
    """With the matrices stored in bf16; a new cache of the same size is the same graph."""
    model = build(torch.float32, **dict(VARIANTS["nesterov-lie_trotter"], n_layer=1))
    model.store_matrices(torch.bfloat16)
    out = continuations(model, IDX[:1, :3], 12)
    for _ in range(2):
        assert torch.equal(continuations(model, IDX[:1, :3], 12, compile=True), out)
        assert no_kernels["stats"]["unique_graphs"] == 1


# -----------------------------------------------------------------------------
# Matrices stored in the precision of the products


@torch.no_grad()
def assert_stored_equals_autocast(dtype=torch.bfloat16, rows=2, **options):
    """Logits of all tokens and of the last, losses, and step by step with a cache."""
    plain, stored = build(torch.float32, **options), build(torch.float32, **options)
    tables = {n: p.clone() for n, p in stored.named_parameters()
              if n.split(".")[1] in ("wte", "wpe", "vte", "vpe")}
    stored.store_matrices(dtype)
    for name, module in stored.named_modules():
        kind = dtype if isinstance(module, torch.nn.Linear) else torch.float32
        assert all(p.dtype == kind for p in module.parameters(recurse=False)), name
    for name, table in tables.items():
        assert torch.equal(stored.get_parameter(name), table)
    assert torch.equal(stored.lm_head.weight, tables["transformer.wte.weight"].to(dtype))

    def outputs(model):
        idx, cache = IDX[:rows], KVCache(12)
        yield from model(idx, idx)
        yield model(idx)[0]
        yield model(idx[:, :1])[0]
        for t in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 10)):
            yield model(idx[:, t], cache=cache)[0]

    with torch.autocast("cpu", dtype):
        expected = list(outputs(plain))
    for i, (a, b) in enumerate(zip(outputs(stored), expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), (i, (a.float() - b.float()).abs().max())


@every_variant
def test_stored_matrices_give_the_numbers_of_autocast(name):
    """Bit for bit."""
    assert_stored_equals_autocast(**VARIANTS[name])


@pytest.mark.parametrize("ffn", ["mlp", "swiglu", "hourglass"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_stored_matrices_of_every_template_and_ffn(template, ffn):
    assert_stored_equals_autocast(template=template, ffn=ffn, bias=True)


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "imex-3", "llama"])
def test_stored_matrices_of_one_row(name):
    """Which a token at a time takes the path of vectors, with biases and without."""
    assert_stored_equals_autocast(rows=1, **VARIANTS[name])


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "llama"])
def test_matrices_stored_in_fp16(name):
    assert_stored_equals_autocast(torch.float16, **VARIANTS[name])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_storing_matrices_as_they_are_changes_nothing(name, dtype):
    model = build(dtype, **VARIANTS[name])
    idx, lengths = padded(prompts_of(LENGTHS))
    before = logits(model), continuations(model, idx, 15, lengths=lengths)
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    model.store_matrices(dtype)
    assert torch.equal(logits(model), before[0])
    assert torch.equal(continuations(model, idx, 15, lengths=lengths), before[1])
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "hourglass-lie_trotter"])
@pytest.mark.parametrize("rows", [1, 2])
def test_generating_under_autocast(name, rows):
    """One row or several, with biases and without, as with the matrices stored."""
    model = build(torch.float32, **VARIANTS[name])
    with BF16():
        out = continuations(model, IDX[:rows, :4], 12)
    model.store_matrices(torch.bfloat16)
    assert torch.equal(out, continuations(model, IDX[:rows, :4], 12))


# -----------------------------------------------------------------------------
# One row


class Ops(TorchDispatchMode):
    """The names of the operations, and the elements of the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for made in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16), (2, 16), (3, 1, 16)])
def test_one_row_equals_a_matrix_product(shape, bias):
    torch.manual_seed(0)
    linear, x = Linear(16, 24, bias=bias).double(), torch.randn(shape).double()
    expected = F.linear(x, linear.weight, linear.bias)
    with torch.no_grad(), Ops() as ops:
        out = linear(x)
    assert_close(out, expected, 1e-12)
    assert ("mv" in ops.names) == (x.numel() == 16)
    with torch.no_grad():
        assert_close(linear(x.repeat(2, *[1] * (x.ndim - 1)).view(2, *shape)[1]), expected, 1e-12)
        wide = torch.stack([x, x], -1)[..., 0]  # not contiguous
        assert_close(linear(wide), expected, 1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_one_row_with_gradients_is_a_matrix_product(bias):
    torch.manual_seed(0)
    linear, x = Linear(16, 24, bias=bias).double(), torch.randn(1, 1, 16, dtype=torch.float64)
    x.requires_grad_()
    plain = torch.autograd.grad(F.linear(x, linear.weight, linear.bias).square().sum(),
                                [x, *linear.parameters()])
    with Ops() as ops:
        ours = torch.autograd.grad(linear(x).square().sum(), [x, *linear.parameters()])
        linear(x.detach())  # also where nothing asks for them
    assert "mv" not in ops.names
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_linear_under_autocast_has_its_precision(bias, rows):
    linear, x = Linear(16, 24, bias=bias), torch.randn(rows, 1, 16, generator=seeded())
    with torch.no_grad(), BF16():
        out, expected = linear(x), F.linear(x, linear.weight, linear.bias)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out.float() - expected.float()).abs().max() < 0.02


# -----------------------------------------------------------------------------
# Head and loss in chunks


def some_targets(which):
    """(2, 10): none ignored, a few, whole chunks, all but one, or all."""
    targets = IDX.roll(-1, 1).clone()
    if which == "few":
        targets[0, 3] = targets[1, 9] = targets[1, 0] = -1
    if which == "chunks":
        targets[0, :8] = targets[1, 5:] = -1
    if which in ("all but one", "all"):
        kept = targets[1, 4].item()
        targets[:] = -1
        targets[1, 4] = kept if which == "all but one" else -1
    return targets


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain(model, targets, idx=IDX, scale=1.0, zero=True, forward=None):
    """Loss and gradients by F.cross_entropy of all logits."""
    if zero:
        model.zero_grad()
    model.loss_chunk = None
    out = (model if forward is None else forward)(idx, idx)[0]
    wide = out if out.dtype == torch.float64 else out.float()
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1)
    (scale * loss).backward()
    return loss.item(), gradients(model)


def chunked(model, targets, chunk, idx=IDX, scale=1.0, zero=True, forward=None):
    if zero:
        model.zero_grad()
    model.loss_chunk = chunk
    none, loss = (model if forward is None else forward)(idx, targets)
    assert none is None and loss.shape == ()
    (scale * loss).backward()
    return loss.item(), gradients(model)


def assert_same_gradients(ours, theirs, tol=1e-12):
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        error, size = (ours[name] - g).abs().max().item(), g.abs().max().item()
        assert ours[name].dtype == g.dtype and error <= tol * max(size, 1e-3), (name, error, size)


def assert_same_training(ours, theirs, tol=1e-12):
    assert ours[0] == pytest.approx(theirs[0], rel=tol)
    assert_same_gradients(ours[1], theirs[1], tol)


@pytest.mark.parametrize("which", ["none", "few", "chunks", "all but one"])
@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "tmm-hourglass-each", "llama"])
def test_a_loss_in_chunks_is_the_loss(name, which):
    """Of 20 tokens: chunks that divide them or do not, of one, and more than there are."""
    model, targets = build(**VARIANTS[name]), some_targets(which)
    expected = plain(model, targets)
    for chunk in (1, 3, 4, 7, 19, 20, 21, 10**9):
        assert_same_training(chunked(model, targets, chunk), expected)


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_the_loss_of_no_target_is_nan_as_ever(chunk):
    model, targets = build(bias=True), some_targets("all")
    assert math.isnan(plain(model, targets)[0]) and math.isnan(chunked(model, targets, chunk)[0])


def test_the_gradients_of_no_target_are_the_plain_ones():
    model, targets = build(bias=True), some_targets("all")
    expected = plain(model, targets)[1]
    assert all((g == 0).all() for g in expected.values())  # torch's
    assert_same_gradients(chunked(model, targets, 7)[1], expected)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("bad", [-2, -100, 48])
def test_a_target_that_is_no_token_is_refused(chunk, bad):
    """Only -1 is ignored: F.cross_entropy raises IndexError for the others."""
    model, targets = build(bias=True), some_targets("few")
    model.loss_chunk, targets[0, 6] = chunk, bad
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model(IDX, targets)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_scaling_the_loss_scales_the_gradients(chunk):
    """By a power of two, as fp16's scaler: bit for bit."""
    model, targets = build(**VARIANTS["nesterov-lie_trotter"]), some_targets("few")
    once, scaled = (chunked(model, targets, chunk, scale=s)[1] for s in (1.0, 65536.0))
    assert all(torch.equal(65536 * once[name], g) for name, g in scaled.items())
    assert_same_gradients(chunked(model, targets, chunk, scale=0.37)[1],
                          plain(model, targets, scale=0.37)[1])


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_accumulating_gradients_of_chunks(chunk):
    """Over micro-batches, one of them of other targets, and after plain ones."""
    model = build(bias=True)
    plain(model, some_targets("none"), scale=1 / 3)
    plain(model, some_targets("few"), scale=1 / 3, zero=False)
    expected = plain(model, some_targets("chunks"), IDX.flip(0), 1 / 3, zero=False)[1]
    chunked(model, some_targets("none"), chunk, scale=1 / 3)
    chunked(model, some_targets("few"), chunk, scale=1 / 3, zero=False)
    ours = chunked(model, some_targets("chunks"), chunk, IDX.flip(0), 1 / 3, zero=False)[1]
    assert_same_gradients(ours, expected)
    plain(model, some_targets("none"), scale=1 / 3)
    chunked(model, some_targets("few"), chunk, scale=1 / 3, zero=False)
    ours = chunked(model, some_targets("chunks"), chunk, IDX.flip(0), 1 / 3, zero=False)[1]
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("name", ["gpt", "nesterov-hourglass-each"])
def test_chunks_with_activation_checkpointing(name):
    model, targets = build(**VARIANTS[name]), some_targets("few")
    expected = plain(model, targets)
    model.activation_checkpointing = True
    for chunk in (3, 20):
        assert_same_training(chunked(model, targets, chunk), expected)


@pytest.mark.parametrize("name, chunk", [("gpt", 7), ("nesterov-lie_trotter", 10)])
def test_chunks_compile_in_one_graph(name, chunk, dynamo):
    model, targets = build(**dict(VARIANTS[name], n_layer=1)), some_targets("few")
    expected = plain(model, targets)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same_training(chunked(model, targets, chunk, forward=forward), expected)
    ours = chunked(model, some_targets("chunks"), chunk, forward=forward)  # not compiled again
    assert_same_training(ours, plain(model, some_targets("chunks")))
    assert dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("asks", [(True, True), (True, False), (False, True), (False, False)])
def test_what_asks_for_gradients_gets_them(asks):
    """The stream and the head, or one of them alone (a frozen body, a frozen head)."""
    gen = seeded()
    x, weight = (torch.randn(n, 6, generator=gen, dtype=torch.float64) for n in (7, 9))
    x, weight = x.requires_grad_(asks[0]), weight.requires_grad_(asks[1])
    targets = torch.tensor([3, -1, 0, 8, 8, -1, 2])
    expected = F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)
    loss = ChunkedCrossEntropy.apply(x, weight, targets, 3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.requires_grad == any(asks)
    wanted = [t for t in (x, weight) if t.requires_grad]
    if wanted:
        for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted),
                        strict=True):
            assert_close(a, b, 1e-12)


def test_the_loss_of_every_token_is_not_cut():
    """reduction="none" gives (B, T), and logits as without chunks, also without gradients."""
    model, targets = build(bias=True), some_targets("few")
    out = model(IDX, IDX)[0].detach()
    each = F.cross_entropy(out.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    model.loss_chunk = 7
    ours, losses = model(IDX, targets, reduction="none")
    assert torch.equal(ours, out) and losses.shape == (2, 10)
    assert_close(losses, each.view(2, 10), 1e-12)
    assert (losses[targets == -1] == 0).all()
    with torch.no_grad():
        mean = model(IDX, targets)[1]
    assert mean.item() == pytest.approx(each.sum().item() / 17, rel=1e-12)
    assert model(IDX)[0].shape == (2, 1, 48)  # and what has no targets is as ever


@pytest.mark.parametrize("context", [contextlib.nullcontext, BF16], ids=["float32", "bfloat16"])
def test_the_logits_of_all_tokens_never_exist(context):
    """96 tokens of 1000 logits; the largest that is made has the elements of the token table."""
    model = build(torch.float32, vocab_size=1000, bias=True)
    idx = torch.randint(1000, (8, 12), generator=seeded())
    for chunk, gradient in itertools.product((8, 13, None), (True, False)):
        model.loss_chunk = chunk
        with torch.set_grad_enabled(gradient), Ops() as ops:
            with context():
                loss = model(idx, idx)[1]
            if gradient:
                loss.backward()
        assert ops.largest == (96_000 if chunk is None else 16_000), (chunk, gradient)


def errors(ours, truth):
    """Of each gradient, squared and relative to its size."""
    return {name: ((ours[name] - g).norm() / g.norm()).item() ** 2 for name, g in truth.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "hourglass-lie_trotter"])
def test_chunks_under_autocast_are_as_exact_as_the_plain_loss(name, dtype):
    """Against float64, over several batches; fp16 with its scale."""
    options = dict(VARIANTS[name], n_embd=32, vocab_size=200, head_dim=16)
    exact, model = build(**options), build(torch.float32, **options)
    exact.load_state_dict(model.state_dict())
    scale = 65536.0 if dtype == torch.float16 else 1.0
    cast = torch.autocast("cpu", dtype)
    sums = {}
    for seed in range(4):
        idx = torch.randint(200, (4, 12), generator=seeded(seed))
        targets = idx.roll(-1, 1).clone()
        targets[0, :seed] = -1
        truth = plain(exact, targets, idx)
        paths = {None: partial(plain, model, targets, idx)}
        paths |= {n: partial(chunked, model, targets, n, idx) for n in (1, 7, 48)}
        for chunk, path in paths.items():
            loss, grads = path(scale=scale, forward=cast(model))
            found = errors({n: g.double() / scale for n, g in grads.items()}, truth[1])
            found["loss"] = (loss / truth[0] - 1) ** 2
            for key, error in found.items():
                sums[chunk, key] = sums.get((chunk, key), 0.0) + error / 4
    for (chunk, key), error in sums.items():
        assert key != "loss" or math.sqrt(error) < 0.01, (chunk, error)
        bound = 2 * math.sqrt(sums[None, key]) + 1e-6
        assert chunk is None or math.sqrt(error) <= bound, (chunk, key, error, bound)


# -----------------------------------------------------------------------------
# Chunks by the command line


def numbers(out):
    """Losses, gradient norms and evaluations of a run."""
    records = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return np.array([r[key] for r in records for key in ("loss", "grad_norm", "val_loss")
                     if key in r])


@pytest.mark.parametrize("options", [
    dict(bias=True), dict(template="nesterov", optimizer="muon", dropout=0.2,
                          activation_checkpointing=True)], ids=["gpt", "yuriiformer"])
def test_training_in_chunks_is_training(run, tmp_path, monkeypatch, options):
    """Micro-batches of 64 tokens; the words reach the model, evaluations see all tokens."""
    seen = []

    def forward(self, *args, wrapped=GPT.forward, **more):
        out = wrapped(self, *args, **more)
        seen.append((torch.is_grad_enabled(), out[0] is None))
        return out

    run(tmp_path / "plain", dtype="float64", **options)
    monkeypatch.setattr(GPT, "forward", forward)
    for chunk in (64, 24, 1000):
        seen.clear()
        run(tmp_path / f"{chunk}", f"--loss_chunk={chunk}", dtype="float64", **options)
        assert set(seen) == {(True, True), (False, False)} and seen.count((True, True)) == 12
        ours, theirs = numbers(tmp_path / f"{chunk}"), numbers(tmp_path / "plain")
        assert len(ours) == 6 * 2 + 3 and np.abs(ours - theirs).max() < 1e-11


def test_resuming_with_chunks(run, tmp_path):
    options = dict(dtype="float64", bias=True)
    run(tmp_path / "plain", **options)
    run(tmp_path / "ours", max_iters=3, lr_decay_iters=6, **options)
    run(tmp_path / "ours", "--loss_chunk=24", init_from="resume", lr_decay_iters=6, **options)
    assert np.abs(numbers(tmp_path / "ours") - numbers(tmp_path / "plain")).max() < 1e-11


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_in_chunks(run, words, tmp_path, parallel):
    options = dict(template="nesterov", dtype="float64", max_iters=3)
    run(tmp_path / "plain", **options)
    run_ranks(words(tmp_path / "two", parallel=parallel, loss_chunk=24, **options), 2)
    assert np.abs(numbers(tmp_path / "two") - numbers(tmp_path / "plain")).max() < 1e-11


@pytest.mark.parametrize("value", ["0", "-1", "-64", "1.5", "many"])
def test_a_bad_chunk_is_one_line(words, tmp_path, monkeypatch, capsys, value):
    out = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["train.py", *words(out), f"--loss_chunk={value}"])
    with pytest.raises(SystemExit) as stop:
        cli(train.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and "loss_chunk" in line
    assert value in line and not out.exists()


# -----------------------------------------------------------------------------
# Drawing


def definition(row, temperature=1.0, top_k=None, top_p=None):
    """The probabilities of a draw, in numpy: of the k likeliest tokens, then of the smallest
    set, found among all sets, whose probability reaches p."""
    p = np.exp(row / temperature - (row / temperature).max())
    if top_k is not None and top_k < len(p):
        p = np.where(np.isin(np.arange(len(p)), np.argsort(-p)[:top_k]), p, 0)
    p /= p.sum()
    if top_p is not None:
        alive = np.flatnonzero(p)
        for size in range(1, len(alive) + 1):
            sets = [list(s) for s in itertools.combinations(alive, size)]
            best = max(sets, key=lambda s: p[s].sum())
            if p[best].sum() >= top_p:
                break
        p = np.where(np.isin(np.arange(len(p)), best), p, 0)
        p /= p.sum()
    return p


HOWS = [dict(), dict(top_k=1), dict(top_k=3), dict(top_k=8), dict(top_k=100), dict(top_p=1e-9),
        dict(top_p=0.3), dict(top_p=0.5), dict(top_p=0.75), dict(top_p=0.9), dict(top_p=0.999),
        dict(top_k=4, top_p=0.8), dict(top_k=2, top_p=0.99), dict(top_k=100, top_p=0.6),
        dict(temperature=0.5), dict(temperature=3.0, top_k=5), dict(temperature=0.3, top_p=0.9),
        dict(temperature=2.0, top_k=6, top_p=0.7)]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_draws_have_the_defined_probabilities(how, n=20_000):
    """Two rows at once, neither in order of likelihood; 5 standard deviations."""
    rows = 1.5 * torch.randn(2, 8, generator=seeded(7))
    drawn = draw(rows.repeat_interleave(n, 0), generator=seeded(), **how).view(2, n)
    for row, ids in zip(rows.double().numpy(), drawn, strict=True):
        p, f = definition(row, **how), np.bincount(ids.numpy(), minlength=8) / n
        assert (f[p == 0] == 0).all(), (f, p)
        assert (np.abs(f - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all(), (f, p)


@pytest.mark.parametrize("p", [0.4, 0.4001, 0.6999, 0.7, 0.7001, 0.9, 1.0])
def test_top_p_at_the_edge(p):
    """Probabilities that float32 has exactly, in eighths and sixteenths, out of order."""
    probs = torch.tensor([1, 4, 0, 8, 2, 1]) / 16
    kept = draw(probs.double().log().repeat(2000, 1), top_p=p, generator=seeded()).unique().tolist()
    edges = {(0, 0.5): {3}, (0.5, 0.75): {1, 3}, (0.75, 0.875): {1, 3, 4},
             (0.9375, 1.0): {0, 1, 3, 4, 5}}
    for (low, high), expected in edges.items():
        if low < p <= high:
            assert set(kept) == expected
    for exact, expected in ((0.5, {3}), (0.75, {1, 3}), (0.875, {1, 3, 4})):
        ids = draw(probs.double().log().repeat(2000, 1), top_p=exact, generator=seeded())
        assert set(ids.tolist()) == expected


@pytest.mark.parametrize("how", [dict(top_k=2), dict(top_p=0.5), dict(top_k=3, top_p=0.9), dict()])
def test_draws_of_a_large_vocabulary(how):
    """The kept ids, not their ranks, in float32 and over many rows of different logits."""
    rows = torch.randn(64, 5000, generator=seeded(3))
    rows[torch.arange(64), torch.arange(64) * 70] = 20.0  # one token has nearly all
    assert torch.equal(draw(rows, generator=seeded(), **how), torch.arange(64) * 70)
    assert torch.equal(draw(rows, temperature=0, **how), torch.arange(64) * 70)
