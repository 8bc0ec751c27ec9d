"""Models to test with: every value of every option in few of them, with random weights."""

import pytest
import torch

from model import GPT, GPTConfig

BASE = dict(block_size=12, vocab_size=48, n_layer=2, n_head=2, n_embd=16, bias=False)
IDX = torch.randint(48, (2, 10), generator=torch.Generator().manual_seed(1))
MOMENTUM = ("polyak", "nesterov", "tmm")
CONTROLS = ("gain", "normed", "frozen", "skip", "x0")
SPLITTINGS = ("lie_trotter", "euler", "strang")

HOURGLASS = dict(ffn="hourglass", ffn_hidden=12, ffn_depth=3, n_head=2, head_dim=4, qk_norm=True,
                 norm="rmsnorm", position="rope", rope_theta=500_000.0, residual_init_scale=False)
LLAMA = dict(ffn="swiglu", norm="rmsnorm", position="rope")


def variants():
    """Every value of every option, and every template with every splitting, in few models."""
    yield "gpt", dict(bias=True)
    yield "gpt-head_dim", dict(head_dim=12, bias=True, activation="gelu_tanh")
    yield "gpt-qk_norm-rope", dict(qk_norm=True, position="rope", bias=True)
    yield "llama", LLAMA
    yield "gd-add", dict(velocity_init="add")
    yield "gd-euler", dict(splitting="euler", ffn="swiglu", ffn_hidden=20, bias=True)
    yield "gd-strang", dict(splitting="strang")
    for template in MOMENTUM:
        for splitting in SPLITTINGS:
            yield f"{template}-{splitting}", dict(template=template, splitting=splitting)
        yield f"{template}-read", dict(
            template=template, splitting="strang", velocity_norm="read", bias=True)
        yield f"{template}-none", dict(
            template=template, velocity_norm="none", velocity_init="zero", bias=True)
    for template in CONTROLS:
        for splitting in SPLITTINGS:
            yield f"{template}-{splitting}", dict(
                template=template, splitting=splitting, bias=splitting == "euler")
    yield "gd-post", dict(norm_place="post", embed_scale=5.0, velocity_init="add", bias=True)
    yield "nesterov-post", dict(LLAMA, template="nesterov", norm_place="post", embed_scale=5.0)
    yield "x0-post-euler", dict(
        template="x0", splitting="euler", norm_place="post", embed_scale=5.0)
    yield "nesterov-llama", dict(template="nesterov", **LLAMA)
    yield "imex-1", dict(template="imex", imex_steps=1, velocity_init="zero")
    yield "imex-2", dict(template="imex")
    yield "imex-3", dict(
        template="imex", imex_steps=3, velocity_norm="none", scalar_map="softplus", bias=True)
    yield "symplectic", dict(template="symplectic", bias=True)
    yield "rmsprop", dict(template="rmsprop")
    yield "adam", dict(template="adam", bias=True)
    yield "adamw", dict(template="adamw")
    for splitting in SPLITTINGS:
        yield f"hourglass-{splitting}", dict(splitting=splitting, **HOURGLASS)
    yield "hourglass-bias", dict(  # d_a = 3 x 6 beside d = 16
        HOURGLASS, bias=True, norm="layernorm", position="learned", n_head=3, head_dim=6,
        ffn_hidden=None)
    each = dict(HOURGLASS, ffn_substeps="each")
    yield "hourglass-each", dict(each, splitting="strang")
    yield "polyak-hourglass-each", dict(each, template="polyak", velocity_norm="none")
    yield "nesterov-hourglass", dict(HOURGLASS, template="nesterov")
    yield "nesterov-hourglass-each", dict(each, template="nesterov", velocity_init="zero")
    yield "tmm-hourglass-euler", dict(HOURGLASS, template="tmm", splitting="euler")
    yield "tmm-hourglass-each", dict(
        each, template="tmm", splitting="strang", velocity_norm="read", scalar_map="softplus")
    yield "imex-hourglass", dict(HOURGLASS, template="imex")
    yield "symplectic-hourglass", dict(HOURGLASS, template="symplectic", velocity_init="zero")
    yield "adamw-hourglass", dict(HOURGLASS, template="adamw", velocity_init="zero")


VARIANTS = dict(variants())
every_variant = pytest.mark.parametrize("name", VARIANTS)


def config(**options):
    return GPTConfig(**{**BASE, **options})


def randomise(model, seed=0):
    """N(0, 0.3) everywhere, around 1 for gains, so that signals neither die nor explode."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = "norm.weight" in name or "ln_" in name and name.endswith("weight")
            p.copy_(0.3 * torch.randn(p.shape, generator=gen, dtype=p.dtype) + gain)
    return model


def build(dtype=torch.float64, state=None, **options):
    """A randomised model in eval mode or, given a state, the model that has these weights.

    Entries of the state that the model has no use for (another template's nu) are left out.
    """
    model = GPT(config(**options)).to(dtype).eval()
    if state is None:
        return randomise(model)
    names = model.state_dict().keys()
    model.load_state_dict({name: w for name, w in state.items() if name in names})
    return model


@torch.no_grad()
def logits(model, idx=IDX):
    return model(idx, targets=idx)[0]


def assert_close(a, b, tol=1e-10):
    assert a.shape == b.shape
    error = (a - b).abs().max() / b.abs().max()
    assert error <= tol, f"relative error {error:.2e}"


BYTES = {"tokenizer": "bytes", "alphabet": "", "vocab_size": 257, "padded_vocab_size": 257}


def write_checkpoint(path, tokenizer=BYTES, vocab_size=None, seed=0, **keys):
    """A model with weights large enough to have an opinion, as train.py saves one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False,
                          vocab_size=vocab_size or tokenizer["padded_vocab_size"]))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    checkpoint = {"model": model.state_dict(), "model_args": vars(model.config), "config": {}}
    torch.save(checkpoint | ({"tokenizer": tokenizer} if tokenizer else {}) | keys, path)
