"""The fused path of momentum: the operation against finite differences and float64 autograd, the
kernel in Triton's interpreter or on a GPU, whole models and runs against the plain path, and what
an edit of model.py does to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses, refused, tensors, val_losses
from torch.nn import functional as F
from variants import BASE, HOURGLASS, IDX, LLAMA, MOMENTUM

import model
from model import GPT, Block, GPTConfig, Momentum
from support.fuse import disagreement, fuse, serves
from support.substep import Substep, gradients, kernel_gradients

CPU = torch.device("cpu")
SERVED = {f"{template}{name}": dict(template=template, **options) for template in MOMENTUM
          for name, options in {
              "": {}, "-bias": dict(bias=True, dropout=0.1), "-llama": dict(LLAMA, embed_scale=5.0),
              "-hourglass": HOURGLASS, "-wide": dict(n_embd=40, ffn="swiglu")}.items()}


def random_inputs(C, dtypes, seed=0, rows=(3, 2)):
    """x, v, g of these types, the scalars and the columns."""
    g = torch.Generator().manual_seed(seed)
    streams = [torch.randn(*rows, C, generator=g, dtype=torch.float64).to(d) for d in dtypes]
    columns = torch.randn(4, C, generator=g, dtype=torch.float64) * 0.3
    columns[::2] += 1
    return streams, torch.tensor([0.5, 0.7, 1.2, 0.4], dtype=torch.float64), columns


# -----------------------------------------------------------------------------
# The operation


def equations(x, v, g, scalars, columns, norm, rms):
    """The substep from the papers' equations, with torch's own norms."""
    beta, gamma, nu, mu = scalars
    w, b, w2, b2 = columns

    def normed(u, gain, bias):
        return (F.rms_norm(u, gain.shape, gain, 1e-5) if rms else
                F.layer_norm(u, gain.shape, gain, bias, 1e-5))

    v = normed(beta * v + gamma * g, w, b)
    x = x + nu * v
    y = x + mu * v
    return x, v, normed(y, w2, b2) if norm else y


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("h", [1.0, 0.5])  # Strang's halves
@pytest.mark.parametrize("nu, mu", [(1.2, 0.4), (1.0, 0.4), (1.0, 0.0)])  # tmm, nesterov, polyak
def test_the_operation_and_its_gradient(norm, rms, h, nu, mu):
    streams, scalars, columns = random_inputs(8, [torch.float64] * 3)
    scalars = torch.tensor([0.5, 0.7 * h, nu * h, mu], dtype=torch.float64)
    columns[1::2] *= not rms  # it has no bias
    inputs = [t.requires_grad_() for t in (*streams, scalars, columns)]
    kind = (norm, rms, not rms, torch.float64)
    expected = equations(*inputs, norm, rms)
    for a, b in zip(Substep.apply(*inputs, *kind), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)
    upstream = [torch.randn_like(t) for t in expected]
    theirs = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    ours = torch.autograd.grad(Substep.apply(*inputs, *kind), inputs, upstream)
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    used = [0, *([] if rms else [1]), *([2] if norm else []), *([3] if norm and not rms else [])]
    torch.testing.assert_close(ours[4][used], theirs[4][used], atol=1e-12, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda *t: Substep.apply(*t, columns, *kind), inputs[:4])


KINDS = [[torch.float32] * 3, [torch.float32, torch.float32, torch.bfloat16], [torch.bfloat16] * 3,
         [torch.float32, torch.float32, torch.float16]]


def kernel_against_formula(device: str, widths: tuple[int, ...]) -> None:
    """Where sums may differ in their last bits, and an element of bf16 in its rounding."""
    for C in widths:
        for seed, dtypes in enumerate(KINDS):
            for norm, rms, bias in ((True, False, True), (True, False, False), (False, True, False),
                                    (True, True, False)):
                streams, scalars, columns = random_inputs(C, dtypes, seed, rows=(1, 7))
                upstream, _, _ = random_inputs(C, dtypes, seed + 9, rows=(1, 7))
                inputs = [t.to(device) for t in (*upstream, *streams)]
                inputs += [scalars.float().to(device), columns.float().to(device)]
                found = list(kernel_gradients(*inputs, norm, rms, bias))
                again = kernel_gradients(*inputs, norm, rms, bias)
                expected = gradients(*inputs, norm, rms)
                assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
                rows = [0, 1, 2, 3, 4] + [5] * bias + [6] * norm + [7] * (norm and bias)
                found[3], expected[3] = found[3][rows], expected[3][rows]
                for a, b, rounded in zip(found, expected, [*dtypes, dtypes[1]], strict=True):
                    assert a.dtype == b.dtype
                    off = (a.double() - b.double()).norm() / b.double().norm()
                    assert off < (1e-6 if rounded == torch.float32 else 8e-3), (C, dtypes, off)


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton", reason="pip install triton runs the kernel in its interpreter")
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_substep as t; " \
           f"t.kernel_against_formula('cpu', (16, 96, 768))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"},
                          cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -----------------------------------------------------------------------------
# Models and runs


def new_model(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**BASE | options))


@pytest.mark.parametrize("name", SERVED)
def test_served_models_compute_what_model_py_does(name):
    gpt = new_model(**SERVED[name])
    before = {n: p.clone() for n, p in gpt.state_dict().items()}
    text = gpt.eval().generate(IDX, 15, temperature=0)
    assert fuse(gpt, True, CPU) == "momentum fused"
    assert torch.equal(gpt.generate(IDX, 15, temperature=0), text)
    assert all(torch.equal(p, before[n]) for n, p in gpt.state_dict().items())
    gpt.double().eval()
    results = []
    for path in (gpt.hidden, lambda *args: GPT.hidden(gpt, *args)):
        gpt.hidden = path
        loss = gpt(IDX, IDX.flip(1))[1]
        results.append([loss, *torch.autograd.grad(loss, list(gpt.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("options", [
    dict(template="gd"), dict(template="frozen"), dict(template="imex"), dict(splitting="strang"),
    dict(norm_place="post"), dict(velocity_norm="read"), dict(HOURGLASS, ffn_substeps="each"),
    dict()])
def test_other_models_take_the_plain_path(options):
    """And one with a hook on a block, as the fused path calls no blocks."""
    gpt = new_model(**{"template": "nesterov", **options})
    if not options:
        gpt.transformer.h[1].register_forward_hook(print)
    assert not serves(gpt) and "fused" not in fuse(gpt, None, CPU)
    refused(lambda: fuse(gpt, True, CPU), "fused=True", "--fused=auto")
    assert "hidden" not in vars(gpt)


def test_it_compiles_as_one_graph():
    gpt = new_model(template="nesterov")
    fuse(gpt, True, CPU)
    torch._dynamo.reset()
    compiled = torch.compile(gpt, backend="aot_eager", fullgraph=True)
    loss = compiled(IDX, IDX.flip(1), return_logits=False)[1]
    loss.backward()
    found = {n: p.grad.clone() for n, p in gpt.named_parameters()}
    gpt.zero_grad()
    gpt(IDX, IDX.flip(1))[1].backward()
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def momentum_forward(self, oracle, state, h=1.0):
    """Without the look-ahead."""
    x, v = state
    v = self.norm(self.scalar("beta") * v + self.scalar("gamma") * h * oracle(x))
    return x + v, v


def block_forward(self, state, rope=None, cache=None, wrapped=Block.forward):
    x, v = wrapped(self, state, rope, cache)
    return x, -v


class Norm(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


def attention_forward(self, x, rope=None, cache=None, wrapped=model.CausalSelfAttention.forward):
    return 2 * wrapped(self, x, rope, cache)


def renamed_forward(self, x, angles=None, kept=None, wrapped=model.CausalSelfAttention.forward):
    return wrapped(self, x, angles["rope"], kept)


def renamed_oracles(self, rope=None, cache=None):
    return (lambda z: self.attn(self.ln_1(z), {"rope": rope}, cache),
            [lambda z: self.mlp(self.ln_2(z))])


EDITS = {
    "calls": (Block, "oracles", renamed_oracles),
    "momentum": (Momentum, "forward", momentum_forward),
    "block": (Block, "forward", block_forward),
    "norm": (model, "make_norm", lambda c: Norm(c.n_embd, eps=1e-5, bias=c.bias)),
    "epsilon": (model, "make_norm", lambda c: torch.nn.LayerNorm(c.n_embd, 1e-6, bias=c.bias)),
    "attention": (model.CausalSelfAttention, "forward", attention_forward)}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_never_overruled(edit, tmp_path, run, monkeypatch):
    monkeypatch.setattr(*EDITS[edit])
    if edit == "calls":
        monkeypatch.setattr(model.CausalSelfAttention, "forward", renamed_forward)
    options = dict(template="nesterov", bias=True, max_iters=3)
    run(tmp_path / "fused", hooks=[forced], **options)
    run(tmp_path / "plain", fused=False, **options)
    assert abs(losses(tmp_path / "fused") - losses(tmp_path / "plain")).max() < 1e-5


def test_a_velocity_that_is_zero_at_first_hides_nothing(monkeypatch):
    """A factor that starts at zero hides the factor of what it multiplies."""
    def forward(self, oracle, state, h=1.0, wrapped=Momentum.forward):
        x, v = wrapped(self, oracle, state, h)
        return x + self.gate * (x - 0.5 * v), v

    monkeypatch.setattr(Momentum, "forward", forward)
    gpt = new_model(template="nesterov")
    for block in gpt.transformer.h:
        for step in block.steps:
            step.learn("gate", 0.0, "identity")
    assert "something else" in disagreement(gpt, CPU)


def test_a_layer_that_is_seldom_dropped_is_seen(monkeypatch):
    """Even if no layer is in the batch that is compared."""
    def forward(self, state, rope=None, cache=None, wrapped=Block.forward):
        return state if torch.rand(()) < 1e-6 else wrapped(self, state, rope, cache)

    monkeypatch.setattr(Block, "forward", forward)
    assert "something else" in disagreement(new_model(template="nesterov"), CPU)


def forced(patch) -> None:
    """As on CUDA: what serves and agrees is taken."""
    def auto(gpt, wanted, device, wrapped=fuse):
        return wrapped(gpt, serves(gpt) or None, device)

    patch.setattr("train.fuse", auto)


@pytest.mark.parametrize("options", [
    dict(template="tmm", optimizer="muon"),
    dict(template="nesterov", dtype="bfloat16", dropout=0.1),
    dict(template="nesterov", dtype="bfloat16", stream_dtype="bfloat16")])
def test_twenty_steps(options, tmp_path, run, capsys):
    options = dict(options, max_iters=20, eval_interval=20)
    for fused in (True, False):
        run(tmp_path / str(fused), fused=fused, **options)
    said = capsys.readouterr().out
    assert "attention, momentum fused" in said and "attention, momentum plain" in said
    rounding = 1e-4 if "dtype" not in options else 2e-2
    assert abs(losses(tmp_path / "True") - losses(tmp_path / "False"))[:, 0].max() < rounding
    assert abs(val_losses(tmp_path / "True")[-1] - val_losses(tmp_path / "False")[-1]) < rounding
    assert tensors(tmp_path / "True").keys() == tensors(tmp_path / "False").keys()
