"""model.py against the specification: the equations (tests/reference.py), every identity,
causality, gradients, compilation, generation, refusals and initial values.

Weights are random everywhere, gains, biases and scalars included, so that nothing hides behind an
initial value. Identities hold in float64; "bit for bit" is torch.equal.
"""

import ast
import gc
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import torch.nn as nn
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from variants import (
    HOURGLASS,
    IDX,
    LLAMA,
    SPLITTINGS,
    VARIANTS,
    assert_close,
    build,
    config,
    every_variant,
    logits,
)

import model as model_module
from model import (
    ATTENTIONS,
    FFNS,
    GPT,
    TEMPLATES,
    CausalSelfAttention,
    GPTConfig,
    HourglassFFN,
    KVCache,
    Momentum,
    OutputProjection,
    Template,
)
from support.log import learned_scalars


def loss_and_gradients(model, forward=None):
    model.zero_grad()
    loss = (model if forward is None else forward)(IDX, targets=IDX.roll(-1, 1))[1]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def edited(model, edit):
    """A copy of the state dict in which edit(name, tensor) replaces what it does not leave None."""
    out = {}
    for name, w in model.state_dict().items():
        new = edit(name, w)
        out[name] = w.clone() if new is None else new
    return out


def inverse_softplus(y):
    return torch.log(torch.expm1(y))


# --------------------------------------------------------------------------- parameter counts

def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("template, velocity_init, small, medium", [
    ("nesterov", "zero", 124_392_264, 354_649_232), ("tmm", "zero", 124_392_288, 354_649_280),
    ("tmm", "embed", 163_812_192, 407_209_152), ("polyak", "embed", 163_812_144, 407_209_056)])
def test_counts_of_yuriiformer(template, velocity_init, small, medium):
    """Of yuriiformer.md, section 6; tests/test_presets.py has those of the hourglass."""
    for expected, shape in ((small, {}), (medium, dict(n_layer=24, n_head=16, n_embd=1024))):
        with torch.device("meta"):
            model = GPT(GPTConfig(bias=False, template=template, velocity_init=velocity_init,
                                  **shape))
        assert count(model) == expected == model.get_num_params(non_embedding=False)
        assert reference.n_parameters(model.config) == expected


# ------------------------------------------------------------------- the equations, and the API

@every_variant
def test_logits_follow_the_equations(name):
    """As the reference finds every name that it needs, the count says that none is superfluous. No
    oracle is asked more often than the equations ask it."""
    model, c, calls = build(**VARIANTS[name]), config(**VARIANTS[name]), []
    oracles = [m for m in model.transformer.h[0].modules() if isinstance(m, OutputProjection)]
    for oracle in oracles:
        oracle.register_forward_hook(lambda m, *_: calls.append(m))
    out = logits(model)
    times, halves = (c.imex_steps if c.template == "imex" else 1), 1 + (c.splitting == "strang")
    assert [calls.count(m) for m in oracles] == [halves * times, *[times] * (len(oracles) - 1)]
    assert_close(out, reference.forward(c, model.state_dict(), IDX))
    assert_close(model(IDX)[0], out[:, -1:])  # without targets, the last position
    assert count(model) == reference.n_parameters(c)


@pytest.mark.parametrize("name", ["gpt", "tmm-strang", "nesterov-hourglass"])
def test_losses_in_float32_and_float64(name):
    targets = IDX.roll(-1, 1)
    targets[:, :3] = -1  # ignored
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = build(dtype, **VARIANTS[name])
        full = reference.forward(config(**VARIANTS[name]), model.state_dict(), IDX)
        expected = -full.log_softmax(-1).gather(-1, targets.clamp(0)[..., None])[..., 0]
        out, mean = model(IDX, targets)
        each = model(IDX, targets, reduction="none")[1]
        assert out.shape == (2, 10, 48) and each.shape == (2, 10) and mean.dtype == dtype
        assert_close(mean.double(), expected[:, 3:].mean(), tol)
        assert_close(each.double()[:, 3:], expected[:, 3:], tol)
        assert (each[:, :3] == 0).all()


# --------------------------------------------------------------- identities of yuriiformer.md

def raw_of_one(dtype):
    """A raw value whose softplus is exactly 1 in this dtype."""
    raw = torch.tensor(math.log(math.e - 1), dtype=dtype)
    below, above = raw.nextafter(raw * 0), raw.nextafter(raw * 2)
    return next(r for r in (raw, below, above) if F.softplus(r) == 1)


@pytest.mark.parametrize("splitting", SPLITTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("template, other, scalars, velocity_norm", [
    ("tmm", "nesterov", "nu", "update"),
    *(("nesterov", "polyak", "mu", norm) for norm in ("update", "read", "none")),
    ("gain", "gd", "gamma", "update"), ("skip", "gd", "alpha", "update"),
    ("x0", "gd", "gamma alpha", "update")])
def test_scalars_that_make_it_another_template(template, other, scalars, velocity_norm, dtype,
                                               splitting):
    """Bit for bit: nu or gamma of 1, mu or alpha of 0."""
    raw = dict(nu=raw_of_one(dtype), gamma=raw_of_one(dtype), mu=torch.tensor(-1000.0),
               alpha=torch.tensor(0.0))
    options = dict(splitting=splitting, velocity_norm=velocity_norm)
    model = build(dtype, template=template, **options)
    before, names = logits(model), tuple(f".{scalar}" for scalar in scalars.split())
    model.load_state_dict(edited(model, lambda name, _: (
        raw[name.rpartition(".")[2]].view(1) if name.endswith(names) else None)))
    assert torch.equal(logits(model),
                       logits(build(dtype, model.state_dict(), template=other, **options)))
    assert not torch.equal(logits(model), before)


def test_gamma_is_redundant_under_the_velocity_norm():
    """(beta, gamma) and (c beta, c gamma) are one function when the norm's eps becomes c^2 eps."""
    options, c = dict(template="nesterov"), 0.5

    def scale(name, w):
        if name.endswith(".beta"):
            return torch.logit(c * torch.sigmoid(w))
        return inverse_softplus(c * F.softplus(w)) if name.endswith(".gamma") else None

    model = build(**options)
    scaled = edited(model, scale)
    assert_close(reference.forward(config(**options), scaled, IDX, velocity_eps=c**2 * 1e-5),
                 logits(model))
    with_eps_fixed = logits(build(state=scaled, **options))
    assert_close(with_eps_fixed, logits(model), tol=1e-2)
    assert (with_eps_fixed - logits(model)).abs().max() > 1e-8  # eps is what is left of gamma


def test_what_is_zero_by_algebra():
    model = build(template="nesterov", velocity_init="zero", bias=True)
    grads = loss_and_gradients(model)[1]
    first, second = "transformer.h.0.steps.0.", "transformer.h.0.steps.1."
    assert 0 < grads[first + "gamma"].abs() < 1e-2 * grads[second + "gamma"].abs()  # only eps
    for h in ("transformer.h.0.", "transformer.h.1."):  # softmax removes q b_k, the same for all k
        q, k, v = grads[h + "attn.c_attn.bias"].split(16)
        assert k.abs().max() < 1e-12 < 1e-6 < min(q.abs().max(), v.abs().max())
    rotated = loss_and_gradients(build(position="rope", bias=True))[1]  # RoPE makes q b_k vary
    assert rotated["transformer.h.0.attn.c_attn.bias"][16:32].abs().max() > 1e-6


def test_imex_1_with_equal_gammas_is_polyak_euler():
    polyak = build(template="polyak", splitting="euler")
    state = polyak.state_dict()
    for i in range(2):
        for gamma in ("gamma_a", "gamma_m"):
            step = f"transformer.h.{i}.steps.0."
            state[step + gamma] = state[step + "gamma"]
    imex = build(state=state, template="imex", imex_steps=1)
    assert_close(logits(imex), logits(polyak), 1e-12)


@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_tmm_is_a_yuriiformer_with_relaxed_ranges(splitting):
    """V~_k = nu_k V_k: nu_k goes into the k-th gain, mu and beta are divided by nu_{k-1}."""
    options = dict(splitting=splitting, scalar_map="softplus")
    tmm = build(template="tmm", bias=True, **options)
    state, nu = tmm.state_dict(), torch.ones(1, dtype=torch.float64)
    steps = sorted(name.removesuffix("nu") for name in state if name.endswith(".nu"))
    assert len(steps) == 2 * {"lie_trotter": 2, "euler": 1, "strang": 3}[splitting]
    for step in steps:
        for scalar in ("mu", "beta"):
            state[step + scalar] = inverse_softplus(F.softplus(state[step + scalar]) / nu)
        nu = F.softplus(state[step + "nu"])
        state[step + "norm.weight"] = nu * state[step + "norm.weight"]
        state[step + "norm.bias"] = nu * state[step + "norm.bias"]
    yurii = build(state=state, template="nesterov", bias=True, **options)
    assert_close(logits(yurii), logits(tmm))


@pytest.mark.parametrize("options, ignored", [
    (dict(), dict(velocity_norm="read", mu_init=0.9, imex_steps=7, ffn_depth=9)),
    (dict(template="rmsprop"), dict(mu_init=0.9, scalar_map="softplus")),
    (dict(template="nesterov"), dict(ffn_substeps="each", ffn_depth=9, rope_theta=5.0))])
def test_options_a_variant_does_not_use_are_ignored(options, ignored):
    model = build(**options)
    assert torch.equal(logits(build(state=model.state_dict(), **options, **ignored)), logits(model))


# ----------------------------------------------------------------- identities of hourglass.md

def test_hourglass_of_one_is_swiglu():
    hourglass = build(**dict(HOURGLASS, ffn_depth=1))
    state = {name.replace("mlp.0.norm", "ln_2").replace("mlp.0.ffn", "mlp"): w
             for name, w in hourglass.state_dict().items()}
    swiglu = build(state=state, **dict(HOURGLASS, ffn="swiglu"))
    assert torch.equal(logits(hourglass), logits(swiglu))


@pytest.mark.parametrize("kept", [None, 0, 1, 2])
def test_w_down_of_zero_silences_a_sub_mlp(kept):
    """All of them, or all but one: z_0 + m_j(z_0)."""
    model, z = build(**HOURGLASS), torch.randn(2, 10, 16, dtype=torch.float64)
    state = edited(model, lambda name, w: (
        w * 0 if "ffn.c_proj" in name and f"mlp.{kept}." not in name else None))
    silent = build(state=state, **HOURGLASS)
    for block, whole in zip(silent.transformer.h, model.transformer.h, strict=True):
        assert torch.equal(block.mlp(z), 0 * z if kept is None else whole.mlp[kept](z))


@pytest.mark.parametrize("splitting", ["lie_trotter", "strang"])
def test_gd_with_joint_and_each_substeps_agree(splitting):
    joint = build(splitting=splitting, **HOURGLASS)
    each = build(state=joint.state_dict(), splitting=splitting, ffn_substeps="each", **HOURGLASS)
    assert_close(logits(each), logits(joint), 1e-12)


# ------------------------------------------------------------------------ causality and decoding

@every_variant
def test_no_token_sees_the_future(name):
    model, idx = build(torch.float32, **VARIANTS[name]), IDX[:1]
    before = logits(model, idx)
    for j in (1, 6, 9):
        changed = idx.clone()
        changed[0, j] = (idx[0, j] + 7) % 48
        after = logits(model, changed)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


@every_variant
def test_decoding_with_a_cache_equals_the_full_forward(name):
    model, cache = build(**VARIANTS[name]), KVCache()
    full, at = logits(model), 0
    with torch.no_grad():
        for size in (4, 3, 1, 1, 1):  # prefill, a chunk of several tokens, single tokens
            out = model(IDX[:, at : at + size], cache=cache)[0]
            at += size
            assert_close(out, full[:, at - 1 : at])


# ------------------------------------------------------------------------------------- gradients

def zero_by_algebra(options):
    """V_0 = 0 is what layer 0's first mu and beta multiply; Adam's beta1 also weighs g."""
    if options.get("velocity_init") != "zero" or options["template"] == "adamw":
        return set()
    return {"transformer.h.0.steps.0.mu", "transformer.h.0.steps.0.beta"}


@every_variant
def test_gradients_reach_every_parameter(name):
    """But those that are zero by algebra; a step along them changes the loss as they say."""
    model, step = build(**VARIANTS[name]), 1e-6
    grads = loss_and_gradients(model)[1]
    zero = {p for p, g in grads.items() if g is None or g.abs().max() == 0}
    assert zero == zero_by_algebra(VARIANTS[name]) & grads.keys()
    assert all(g.isfinite().all() for g in grads.values())

    losses = []
    for by in (step, -2 * step):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(grads[name], alpha=by)
        losses.append(model(IDX, IDX.roll(-1, 1))[1].item())
    slope = sum(g.square().sum().item() for g in grads.values())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


# ----------------------------------------------------------------------------------- compilation

COMPILED = ("llama", "gd-add", "gpt-qk_norm-rope", "polyak-read", "tmm-strang", "imex-2",
            "nesterov-hourglass-each", "symplectic", "rmsprop", "adamw", "x0-post-euler",
            "frozen-strang")


@pytest.fixture
def dynamo():
    """Nothing remembered from other models; no garbage collection inside, a third of the time."""
    torch._dynamo.reset()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_in_one_graph(name, dynamo):
    model = build(torch.float32, **dict(VARIANTS[name], n_layer=1, ffn_depth=2))
    loss, grads = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled_loss, compiled_grads = loss_and_gradients(model, compiled)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for p, g in grads.items():
        torch.testing.assert_close(compiled_grads[p], g, rtol=1e-3, atol=1e-5, msg=p)


# ------------------------------------------------------------------------------------- generation

@pytest.mark.parametrize("name", ["gpt", "tmm-strang", "imex-2", "nesterov-hourglass-each"])
def test_greedy_is_the_argmax_of_full_forwards(name):
    """Past the block, after one of the windows of T/2 to T tokens that slide along."""
    model = build(**VARIANTS[name])
    for start in (5, 12, 15):
        prompt = torch.arange(2 * start).view(2, start)
        out = model.generate(prompt, 16, temperature=0)
        assert torch.equal(out, model.generate(prompt, 16, top_k=1))
        assert out.shape == (2, start + 16) and torch.equal(out[:, :start], prompt)
        for t in range(start, start + 16):
            windows = range(6, 13) if t > 12 else [t]
            assert any(torch.equal(logits(model, out[:, t - w : t])[:, -1].argmax(-1), out[:, t])
                       for w in windows), t


def test_generation_is_reproducible_and_never_draws_padded_rows():
    model, outs = build(bias=True, vocab_used=4), []
    with torch.no_grad():
        model.lm_head.weight[4:] *= 100  # which would win
    assert model(IDX)[0].argmax() >= 4
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(model.generate(IDX, 20, temperature=3.0, top_k=100))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert outs[0].shape == (2, 30) and torch.equal(outs[0][:, :10], IDX)
    assert outs[0][:, 10:].unique().tolist() == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------- refusals

each_substep = dict(ffn="hourglass", ffn_substeps="each")
REFUSED = [  # options, and words that the message must contain: the option, its value, the fix;
    # single numbers are in tests/hostile
    (dict(template="adam", splitting="strang"), "splitting strang adam lie_trotter"),
    (dict(template="imex", splitting="euler"), "splitting euler imex lie_trotter"),
    (dict(each_substep, splitting="euler"), "ffn_substeps each euler joint"),
    (dict(each_substep, template="imex"), "ffn_substeps each imex joint"),
    (dict(each_substep, template="adam"), "ffn_substeps each adam joint"),
    (dict(template="adamw", velocity_init="add"), "velocity_init add adamw stream gd"),
    (dict(template="imex", velocity_norm="read"), "velocity_norm read imex update"),
    (dict(template="symplectic", velocity_norm="none"), "velocity_norm none symplectic update"),
    (dict(n_embd=18, n_head=4), "n_embd 18 n_head 4 head_dim"),
    (dict(position="rope", n_embd=18, n_head=2), "head_dim 9 rope even"),
    (dict(template="nesterov", mu_init=1.0), "mu_init 1.0 softplus"),
    (dict(vocab_used=49), "vocab_used 49 vocab_size 48"),
    (dict(ffn="hourglass", norm_place="post"), "norm_place post hourglass pre swiglu"),
    (dict(embed_scale=0.0), "embed_scale 0.0 positive"),
    *(({"template": "polyak", option: "other"}, f"{option} other {value}") for option, value in (
        ("template", "nesterov"), ("splitting", "strang"), ("norm", "rmsnorm"),
        ("position", "rope"), ("ffn", "swiglu"), ("activation", "gelu_tanh"),
        ("ffn_substeps", "joint"), ("velocity_init", "embed"), ("velocity_norm", "read"),
        ("norm_place", "post"), ("scalar_map", "softplus"), ("attention", "causal"))),
]


@pytest.mark.parametrize("options, words", REFUSED)
def test_bad_combinations_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        config(**options)
    missing = [word for word in words.split() if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


# --------------------------------------------------------------------------------- initial values

WIDE = dict(n_layer=3, n_embd=64, n_head=4, vocab_size=512, block_size=256)


def new(**options):
    torch.manual_seed(0)
    return GPT(config(**{**WIDE, **options}))


@pytest.mark.parametrize("options, scale", [
    (dict(bias=True), 6**-0.5), (dict(template="tmm"), 6**-0.5),
    (dict(template="frozen", embed_scale=35.0), 6**-0.5), (dict(velocity_init="add"), 6**-0.5),
    (dict(template="adam", residual_init_scale=False), 1),
    (dict(HOURGLASS, n_head=4, head_dim=12, ffn_hidden=None, residual_init_scale=True), 6**-0.5),
    (dict(HOURGLASS, n_head=4, head_dim=12, ffn_hidden=None, template="nesterov"), 1),
    (dict(LLAMA, template="imex", residual_init_scale=False), 1)])
def test_initial_weights(options, scale):
    """N(0, 0.02), and attention-out and FFN-down times 1/sqrt(2L), whatever K; also the tables that
    embed_scale multiplies, of which one is the head."""
    for name, p in new(**options).named_parameters():
        if p.ndim == 2:
            std = 0.02 * (scale if name.endswith("c_proj.weight") else 1)
            assert p.std().item() == pytest.approx(std, rel=0.07), name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name
        elif "norm" in name or "ln_" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name


ONE = math.log(math.e - 1)  # softplus(ONE) = 1
RAW = dict(mu=0, beta=0, gamma=0, gamma_a=0, gamma_m=0, beta1=0, beta2=0, lam=-5, alpha=0, nu=ONE,
           eta=ONE)
INITIAL_SCALARS = [  # options, and the raw values that are not RAW's
    *((dict(template=name), {}) for name in TEMPLATES if name not in ("gain", "x0")),
    *((dict(template=name, gamma_init=3.0), dict(gamma=ONE)) for name in ("gain", "x0")),
    (dict(template="nesterov", mu_init=0.9, beta_init=0.9, gamma_init=1.0),
     dict(mu=math.log(9), beta=math.log(9), gamma=ONE)),
    (dict(template="nesterov", scalar_map="softplus", mu_init=1.0, beta_init=math.log(2)),
     dict(mu=ONE)),
    (dict(template="symplectic", gamma_init=800.0), dict(gamma=800)),
    (dict(template="frozen", beta_init=0.9), dict(beta=math.log(9))),
]


@pytest.mark.parametrize("options, changed", INITIAL_SCALARS)
def test_initial_scalars(options, changed):
    """The raw values; n per layer as the specification's tables say."""
    c = config(**options)
    scalars = GPT(c).parameter_roles()["scalar"]
    assert len(scalars) == 2 * reference.SCALARS[c.template] * reference.n_substeps(c)
    for name, p in scalars.items():
        assert p.shape == (1,) and p.dtype == torch.float32
        assert p.item() == pytest.approx((RAW | changed)[name.split(".")[-1]], abs=1e-6), name


# ------------------------------------------------------------------------------ the rest of the API

def test_num_params_and_mfu_are_nanogpts():
    model = GPT(config(bias=True))
    assert model.get_num_params(non_embedding=False) == count(model)
    assert model.get_num_params() == count(model) - 12 * 16  # without the positions
    assert 0 < model.estimate_mfu(4, 2.0) == pytest.approx(model.estimate_mfu(8, 8.0) * 2)


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "nesterov-hourglass"])
def test_crop_block_size(name):
    model = build(**VARIANTS[name])
    before = logits(model, IDX[:, :6])
    model.crop_block_size(6)
    assert model.config.block_size == 6 and torch.equal(logits(model, IDX[:, :6]), before)
    for table, p in model.named_parameters():
        assert "wpe" not in table and "vpe" not in table or p.shape == (6, 16)
    for cache in (None, KVCache(100)):
        with pytest.raises(ValueError, match="7 tokens: there is room for 6; crop the input"):
            model(IDX[:, :7], cache=cache)


def test_generate_makes_room_for_what_it_reads(monkeypatch):
    """Not for a long context."""
    made, init = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda cache, n: made.append(n) or init(cache, n))
    build().generate(IDX[:, :3], 4)
    assert made == [7]


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "imex-2", "adamw", "gd-post",
                                  "nesterov-post", "skip-euler", "x0-post-euler"])
def test_streams_and_losses_stay_fp32_under_autocast(name):
    model, seen = build(torch.float32, **VARIANTS[name]), []
    watched = ["transformer.ln_f"]
    if VARIANTS[name].get("template"):
        watched.append("transformer.h.1.steps.0.norm")
    if "norm_place" in VARIANTS[name]:
        watched += ["transformer.h.1.ln_1", "transformer.h.1.ln_2"]
    for module in watched:
        model.get_submodule(module).register_forward_hook(
            lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDX, IDX)[1]
    assert set(seen[:-1]) == {torch.float32}  # the last is ln_f's output, which feeds a matmul
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt", "nesterov-lie_trotter", "imex-2", "tmm-hourglass-each",
                                  "adamw", "frozen-strang", "x0-post-euler"])
def test_streams_in_bf16(name):
    """Stored in bf16 between substeps, computed in fp32: logits to bf16's rounding, with and
    without autocast, and from a cache the same as in one pass."""
    model, seen = build(**VARIANTS[name], stream_dtype="bfloat16").float(), set()
    plain = build(**VARIANTS[name]).float()
    for step in model.transformer.h[0].steps:
        step.norm.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, inputs, state: seen.update(s.dtype for s in state))
    logits, loss = model(IDX, IDX)
    assert torch.bfloat16 in seen and logits.dtype == torch.float32
    expected = plain(IDX, IDX)[0]
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    cache = KVCache()
    for t in range(4):
        step = model(IDX[:, t:t + 1], cache=cache)[0]
    torch.testing.assert_close(step[:, 0], logits[:, 3], atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDX, IDX)[1].sub(loss).abs() < 0.1


@pytest.mark.parametrize("template", ["gd", "tmm"])
def test_bf16_streams_stay_in_compiled_graphs(template):
    """torch < 2.12 takes fp32 -> bf16 -> fp32 out of a graph, and streams would be stored in fp32.
    Only what the embeddings, or the last substep, have rounded is converted at once."""
    model = build(template=template, stream_dtype="bfloat16", bias=False).float()
    graphs, conversion = [], torch.ops.aten._to_copy.default

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    model.compile(backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDX, IDX, return_logits=False)[1].backward()
    copies = [node for node in graphs[0].graph.nodes if node.target is conversion]
    assert len([node for node in copies if node.meta["val"].dtype == torch.bfloat16]) > 4
    assert len([node for node in copies if node.args[0].target is conversion]) <= 1


def test_dropout_acts_in_training_only():
    with_dropout = build(dropout=0.5, template="nesterov")
    without = build(state=with_dropout.state_dict(), template="nesterov")
    assert torch.equal(logits(with_dropout), logits(without))
    assert not torch.equal(logits(with_dropout.train()), logits(without))


# -----------------------------------------------------------------------------
# What a fork adds: one class and one line in a table, nothing else


class Scheduled(Template):
    """Heavy ball from zero, without a norm, whose momentum grows with the layer; what it asks at
    is an average of x, with a beta for each channel."""

    streams, velocity_norms = ("zeros", "x"), ()

    def __init__(self, config, layer, index):
        super().__init__(config, layer, index)
        self.momentum = (layer + 1) / (layer + 3)
        self.learn("beta", 0.25, "sigmoid", shape=(config.n_embd,))

    def forward(self, oracle, state, h=1.0):
        x, v, average = state
        average = average.lerp(x, self.scalar("beta"))
        v = self.momentum * v + h * oracle(average)
        return x + h * v, v, average


class Gated(Template):
    """A learned gate on every answer."""

    def __init__(self, config, layer, index):
        super().__init__(config, layer, index)
        self.gate = nn.Linear(config.n_embd, 1)

    def forward(self, oracle, state, h=1.0):
        (x,) = state
        return (x + h * self.gate(x).sigmoid() * self.norm(oracle(x)),)


class Extragradient(Template):
    """The gradient where a first step leads."""

    oracle_calls, velocity_norms, splittings = 2, (), ("lie_trotter", "strang")

    def forward(self, oracle, state, h=1.0):
        (x,) = state
        return (x + h * oracle(x + h * oracle(x)),)


def expected(model, name, idx):
    """The final x in float64, by a loop over the substeps."""
    t = model.transformer
    x = t.wte(idx) + t.wpe.weight[:idx.size(1)]
    v, average = torch.zeros_like(x), x
    for n, block in enumerate(t.h):
        for k, oracle in enumerate((lambda z, b=block: b.attn(b.ln_1(z)),
                                    lambda z, b=block: b.mlp(b.ln_2(z)))):
            if name == "scheduled":
                beta = 1 / (1 + (-block.steps[k].beta).exp())
                average = (1 - beta) * average + beta * x
                v = (n + 1) / (n + 3) * v + oracle(average)
                x = x + v
            elif name == "gated":
                g = block.steps[k].gate
                share = 1 / (1 + (-(x @ g.weight[0] + g.bias)[..., None]).exp())
                x = x + share * block.steps[k].norm(oracle(x))
            else:
                x = x + oracle(x + oracle(x))
    return x


@pytest.fixture(params=["scheduled", "gated", "extragradient"])
def added(request, monkeypatch):
    """The name of a template that was added to the table."""
    template = dict(scheduled=Scheduled, gated=Gated, extragradient=Extragradient)
    monkeypatch.setitem(TEMPLATES, request.param, template[request.param])
    return request.param


def test_an_added_template(added):
    model, plain = build(template=added), build(template="gd")
    with torch.no_grad():
        assert_close(model.hidden(IDX), model.transformer.ln_f(expected(model, added, IDX)))
    scalars = {"scheduled": 4, "gated": 8}.get(added, 0)  # 2 layers of 2 substeps
    assert len(model.parameter_roles()["scalar"]) == scalars
    calls = 2 if added == "extragradient" else 1
    head = 6 * model.config.vocab_size * model.config.n_embd
    assert model.flops_per_token() - head == calls * (plain.flops_per_token() - head)


def test_an_added_template_takes_the_splittings_that_it_says(added):
    for splitting in SPLITTINGS:
        if splitting in TEMPLATES[added].splittings:
            build(template=added, splitting=splitting)(IDX, IDX)
        else:
            with pytest.raises(ValueError, match="use splitting=lie_trotter or strang"):
                config(template=added, splitting=splitting)


def test_a_channels_beta_starts_where_it_should(monkeypatch):
    monkeypatch.setitem(TEMPLATES, "scheduled", Scheduled)
    model = GPT(config(template="scheduled"))
    for block in model.transformer.h:
        for step in block.steps:
            assert_close(step.scalar("beta"), torch.full((config().n_embd,), 0.25), 1e-6)
    assert learned_scalars(model)["beta"] == [[pytest.approx(0.25)] * 2] * 2


def test_an_exported_program_takes_texts_of_any_length():
    model, length = build(position="rope"), torch.export.Dim("length", min=2, max=12)
    program = torch.export.export(model, (IDX,), dynamic_shapes=({1: length},)).module()
    assert_close(program(IDX[:, :5])[0], model(IDX[:, :5])[0])


@pytest.mark.parametrize("gamma", [1e-20, 0.5, 800.0])
def test_scalars_from_tiny_to_large(gamma):
    step = GPT(config(template="polyak", gamma_init=gamma)).transformer.h[0].steps[0]
    assert_close(step.scalar("gamma") / gamma, torch.ones(1), 1e-5)


class ReLU2(nn.Module):
    """W_proj relu(W_fc x)^2."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.c_proj = OutputProjection(config.d_ffn, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Window(CausalSelfAttention):
    """Attention that is only causal."""


def test_an_added_ffn_and_attention(monkeypatch):
    monkeypatch.setitem(FFNS, "relu2", ReLU2)
    monkeypatch.setitem(ATTENTIONS, "window", Window)
    model = GPT(config(ffn="relu2", attention="window", template="nesterov"))
    assert isinstance(model.transformer.h[0].attn, Window)
    mlp = model.transformer.h[0].mlp
    assert mlp.c_proj.weight.std() < 0.7 * mlp.c_fc.weight.std()  # it writes to the stream
    assert len(model.parameter_roles()["matrix"]) == 8
    assert model.flops_per_token() == build(template="nesterov").flops_per_token()
    with pytest.raises(ValueError, match=r"ffn=relu: expected mlp \| swiglu \| hourglass \| relu2"):
        config(ffn="relu")


class Bare(nn.Module):
    """An FFN with a parameter that nobody knows."""

    role: str | None = None

    def __init__(self, config):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return self.scale * x


class Careless(Gated):
    """A template with a parameter that starts nowhere."""

    def __init__(self, config, layer, index):
        super().__init__(config, layer, index)
        self.beta = nn.Parameter(torch.empty(config.n_embd))


def test_a_parameter_without_a_role_is_an_error(monkeypatch):
    monkeypatch.setitem(FFNS, "bare", Bare)
    monkeypatch.setitem(TEMPLATES, "careless", Careless)
    with pytest.raises(ValueError, match=r'h\.0\.mlp\.scale: .* Bare.*role = "matrix"'):
        build(ffn="bare")
    with pytest.raises(ValueError, match=r"h\.0\.steps\.0\.beta: .*self\.learn\(name, start"):
        build(template="careless")
    model = build()
    model.transformer.h[1].bias = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"h\.1\.bias: .*Block"):
        model.parameter_roles()


class Sinks(CausalSelfAttention):
    """Attention with a bare parameter, whose role is not that of the matrices beside it."""

    role = "norm"

    def __init__(self, config):
        super().__init__(config)
        self.sinks = nn.Parameter(torch.zeros(config.n_head))


class Several(Bare):
    """Matrices of two and of three dimensions."""

    role = "matrix"

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.ones(4, config.n_embd))
        self.experts = nn.Parameter(torch.ones(4, config.n_embd, config.n_embd))


class Mixed(Gated):
    """A template with a module of another role."""

    def __init__(self, config, layer, index):
        super().__init__(config, layer, index)
        self.gate.role = "matrix"


def test_roles_that_a_fork_says(monkeypatch):
    """A bare parameter's is its module's own, not that of the modules in it. Muon takes no more
    dimensions than two."""
    monkeypatch.setitem(ATTENTIONS, "sinks", Sinks)
    monkeypatch.setitem(FFNS, "several", Several)
    monkeypatch.setitem(TEMPLATES, "mixed", Mixed)
    model = build(attention="sinks", ffn="several", template="mixed")
    model.role, model.registers = "embedding", nn.Parameter(torch.zeros(2, 32))
    assert {role: {name.removeprefix("transformer.h.1.") for name in names if ".h.0." not in name}
            for role, names in model.parameter_roles().items()} == {
        "matrix": {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.gate", "steps.0.gate.weight",
                   "steps.1.gate.weight"},
        "embedding": {"transformer.wte.weight", "transformer.wpe.weight", "registers",
                      "mlp.experts"},
        "norm": {"transformer.ln_f.weight", "ln_1.weight", "ln_2.weight", "attn.sinks", "mlp.scale",
                 *(f"steps.{i}.{name}" for i in (0, 1) for name in ("gate.bias", "norm.weight"))},
        "scalar": set()}


def test_a_fork_of_the_hourglass_is_one(monkeypatch):
    """Whatever its name: in its width, its substeps and its norms."""
    monkeypatch.setitem(FFNS, "sandglass", type("Sandglass", (HourglassFFN,), {}))
    options = dict(template="nesterov", ffn_depth=3, ffn_substeps="each")
    models = [build(ffn=ffn, **options) for ffn in ("hourglass", "sandglass")]
    first, second = ({n: p.shape for n, p in model.named_parameters()} for model in models)
    assert first == second and len(models[1].transformer.h[0].steps) == 4
    with pytest.raises(ValueError, match="norm_place=post: ffn=sandglass brings"):
        config(ffn="sandglass", norm_place="post")


def test_a_forks_typo_is_named(monkeypatch):
    with pytest.raises(KeyError, match="tanh"):
        build().transformer.h[0].steps[0].learn("beta", 0.5, "tanh")
    monkeypatch.setitem(TEMPLATES, "typo", type("Typo", (Momentum,), {"streams": ("embeded",)}))
    with pytest.raises(KeyError, match="embeded"):
        build(template="typo")(IDX)


def test_this_file_alone(tmp_path):
    shutil.copy(model_module.__file__, tmp_path / "model.py")
    program = ("import torch; from model import GPT, GPTConfig\n"
               "c = GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=8,\n"
               "              template='tmm', ffn='hourglass', ffn_depth=2)\n"
               "model, x = GPT(c), torch.randint(17, (2, 8))\n"
               "adamw = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')\n"
               "before = model(x, x)[1]; before.backward(); adamw.step()\n"
               "assert model(x, x)[1] < before\n"
               "print(model.generate(x[:, :2], 9).shape)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.stdout.strip() == "torch.Size([2, 11])", done.stderr
    tree = ast.parse(Path(model_module.__file__).read_text())
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, kinds) for node in tree.body[1:])  # nothing runs at its import


def test_temperatures_too_small_to_divide_by():
    model = GPT(config()).eval()
    idx = torch.zeros(1, 1, dtype=torch.long)
    greedy = model.generate(idx, 5, temperature=0)
    assert torch.equal(model.generate(idx, 5, temperature=1e-40), greedy)


def test_rope_asks_nothing_of_the_head():
    """Which may be quantised, or another module."""
    model = GPT(config(position="rope"))
    model.lm_head = torch.nn.Identity()
    assert model(torch.zeros(1, 2, dtype=torch.long))[0].shape == (1, 1, model.config.n_embd)
