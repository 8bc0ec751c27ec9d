"""Every preset in config/: what its docstring says is true, and a small copy of it trains. The
papers' rows have the papers' counts and recipes; a preset of your own needs no line here."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from conftest import option_words

from config import read_config
from model import GPT, GPTConfig
from prepare import PrepareConfig
from train import TrainConfig, make_optimizers, model_args

PRESETS = {p.stem: p for p in (Path(__file__).parent.parent / "config").glob("[a-z]*.py")}
every_preset = pytest.mark.parametrize("name", sorted(PRESETS))
VOCABULARY = {"openwebtext": 50_304, "tinystories": 50_304, "fineweb_edu_gpt2": 50_304,
              "fineweb_edu_cl100k": 100_352, "shakespeare_char": 65, "pydoc": 257,
              "tinystories_bytes": 257}

# GPT: L (12 d^2 + 2 d) + V d + T d + d. Velocity tables: (V + T) d; velocity norms: 2 L d; scalars:
# 4, 6 or 8 a layer. SwiGLU and hourglass: N + L (2 d_a + K d + d) + d + V d.
PARAMETERS = {
    "gpt2_124m": 124_373_760, "gpt_tinystories": 124_373_760, "gpt_owt": 124_373_760,
    "polyak_tinystories": 163_812_144,
    "yurii_tinystories": 163_812_168, "yurii_owt": 163_812_168, "yurii_owt_tuned": 163_812_168,
    "tmm_tinystories": 163_812_192, "tmm_owt": 163_812_192,
    "gpt_owt_medium": 354_599_936, "yurii_owt_medium": 407_209_104,
    "shakespeare_char": 10_745_088,
    "shakespeare_char_fast": 402_688,  # nanoGPT's CPU recipe has 804,096
    "swiglu_113m": 151_917_312, "hourglass_113m": 176_405_280,
    "swiglu_400m": 454_263_808, "hourglass_400m": 487_664_768,
    "swiglu_906m": 1_060_259_328, "hourglass_906m": 1_159_291_584,
    "swiglu_3b": 3_479_522_304, "hourglass_3b": 3_539_145_168,
    "swiglu_8b": 8_196_198_400, "hourglass_8b": 8_289_531_008,
    "hourglass_yurii_owt": 239_199_684,  # no position tables, so none for V either
}
SMALL = dict(batch_size=30, gradient_accumulation_steps=16, block_size=1024, optimizer="muon",
             learning_rate=6e-4, min_lr=6e-5, muon_weight_decay=0.0, weight_decay=0.1,
             grad_clip=1.0, schedule="cosine", eval_interval=100, eval_tokens=4_915_200,
             dropout=0.0, bias=False, residual_init_scale=True, norm="layernorm",
             position="learned")
STORIES = dict(SMALL, dataset="tinystories", max_iters=10_000, warmup_iters=1000, muon_lr=0.02)
WEB = dict(SMALL, dataset="openwebtext", max_iters=30_000, warmup_iters=3000, muon_lr=0.004)
MEDIUM = dict(WEB, muon_lr=0.006, n_layer=24, n_head=16, n_embd=1024)
WIDE = dict(norm="rmsnorm", position="rope", rope_theta=500_000.0, qk_norm=True,
            residual_init_scale=False)
PAIR = dict(WIDE, optimizer="adamw", weight_decay=0.1, schedule="cosine", grad_clip=1.0,
            bias=False, dropout=0.0, min_lr=6e-5, block_size=4096)
PAIRS = {"906m": dict(PAIR, max_iters=4297, learning_rate=2.5e-4, warmup_iters=25),
         "3b": dict(PAIR, max_iters=14_305, learning_rate=1.6e-4, warmup_iters=100),
         "8b": dict(PAIR, max_iters=23_842, learning_rate=1.2e-4, warmup_iters=100)}
RECIPES = {
    "gpt2_124m": dict(batch_size=12, gradient_accumulation_steps=40, block_size=1024,
                      max_iters=600_000, lr_decay_iters=None, warmup_iters=2000, min_lr=6e-5,
                      learning_rate=6e-4, weight_decay=0.1, optimizer="adamw", template="gd"),
    "shakespeare_char": dict(batch_size=64, gradient_accumulation_steps=1, block_size=256,
                             n_layer=6, n_head=6, n_embd=384, dropout=0.2, learning_rate=1e-3,
                             max_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
                             always_save_checkpoint=False),
    "gpt_tinystories": dict(STORIES, template="gd"),
    "polyak_tinystories": dict(STORIES, template="polyak"),
    "yurii_tinystories": dict(STORIES, template="nesterov"),
    "tmm_tinystories": dict(STORIES, template="tmm"),
    "gpt_owt": dict(WEB, template="gd"),
    "yurii_owt": dict(WEB, template="nesterov"),
    "tmm_owt": dict(WEB, template="tmm"),
    "gpt_owt_medium": dict(MEDIUM, template="gd"),
    "yurii_owt_medium": dict(MEDIUM, template="nesterov"),
    "yurii_owt_tuned": dict(WEB, template="nesterov", muon_weight_decay=0.1, warmup_iters=40,
                            schedule="wsd"),
    "hourglass_yurii_owt": WEB | WIDE | dict(template="nesterov"),
    **{f"{kind}_{size}": PAIRS[size] for kind in ("swiglu", "hourglass") for size in PAIRS},
}


@cache
def load(name: str) -> TrainConfig:
    return read_config(TrainConfig, [str(PRESETS[name])])[0]


@cache
def model_of(name: str) -> GPT:
    """Without its weights, with the vocabulary that the preset's data has."""
    rows = load(name).vocab_size or VOCABULARY[load(name).dataset]
    with torch.device("meta"):
        return GPT(GPTConfig(**model_args(load(name)) | {"vocab_size": rows}))


def tokens_per_step(c: TrainConfig) -> int:
    return c.batch_size * c.gradient_accumulation_steps * c.block_size


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts(name):
    """Parameters, matrices and FLOPs are those of the formulas."""
    model = model_of(name)
    c, N = model.config, reference.n_matrices(model.config)
    matrices = sum(p.numel() for p in model.parameter_roles()["matrix"].values())
    assert matrices == N
    assert model.get_num_params(non_embedding=False) == PARAMETERS[name]
    assert reference.n_parameters(c) == PARAMETERS[name]
    assert model.flops_per_token() == 3 * (
        2 * N + 2 * c.block_size * c.d_attn * c.n_layer + 2 * c.vocab_size * c.n_embd)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    c = load(name)
    usual = dict(beta1=0.9, beta2=0.95, decay_lr=True, velocity_init="embed",
                 velocity_norm="update")
    assert {**vars(c), **usual, **RECIPES[name]} == vars(c)


def test_what_upstream_overwrites_are_options():
    """Of the docstring of swiglu_906m."""
    words = ["--weight_decay=0.033", "--adam_eps=1e-5"]
    c = read_config(TrainConfig, [str(PRESETS["hourglass_906m"]), *words])[0]
    for optimizer in ("adamw", "muon"):
        c.optimizer = optimizer
        groups = make_optimizers(model_of("hourglass_906m"), c, torch.device("meta"))["adamw"]
        assert all(group["eps"] == 1e-5 for group in groups.param_groups)
        assert {group["weight_decay"] for group in groups.param_groups} == {0.0, 0.033}


@pytest.mark.parametrize("size", ["113m", "400m", "906m", "3b", "8b"])
def test_the_hourglass_pairs_differ_in_nothing_but_shape(size):
    base, hourglass = load(f"swiglu_{size}"), load(f"hourglass_{size}")
    shape = {"out_dir", "n_layer", "n_embd", "n_head", "head_dim", "ffn", "ffn_hidden", "ffn_depth"}
    assert {k for k in vars(base) if getattr(base, k) != getattr(hourglass, k)} <= shape
    sizes = [reference.n_matrices(model_of(f"{kind}_{size}").config)
             for kind in ("hourglass", "swiglu")]
    assert abs(sizes[0] / sizes[1] - 1) < 0.004
    assert base.d_attn == hourglass.d_attn  # the attention width is kept
    assert hourglass.ffn_depth == 4 and hourglass.ffn_hidden < hourglass.n_embd


def is_rounded(text: str, value: float) -> bool:
    """Is "1.2e19" (any number of digits) the value, rounded?"""
    mantissa, _, exponent = text.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(text) - value) <= 0.51 * unit


@every_preset
def test_what_the_docstring_says(name):
    """Its cost follows from the settings; its `python prepare.py ...` makes its data."""
    text = PRESETS[name].read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    said = dict(re.findall(r"^(\w+): +(.+)", docstring, re.MULTILINE))
    if name in PARAMETERS:
        assert docstring.split("\n\n")[0].endswith(".") and {"Cost", "Expected"} <= said.keys()
        assert load(name).out_dir == f"out-{name.replace('_', '-')}"
    if count := re.search(r"It has (\S+) M parameters", docstring):
        assert is_rounded(count[1], PARAMETERS[name] / 1e6)
    if cost := re.match(r"(\S+) ([MG]) tokens, (\S+) FLOP", said.get("Cost", "")):
        c, unit = load(name), {"M": 1e6, "G": 1e9}[cost[2]]
        tokens = tokens_per_step(c) * c.max_iters
        assert is_rounded(cost[1], tokens / unit)
        if c.vocab_size or c.dataset in VOCABULARY:
            flops = tokens * model_of(name).flops_per_token()
            assert is_rounded(cost[3], flops)
            if time := re.search(r"(\S+) (h|days) (?:on|of) one H100 at 40 % MFU", said["Cost"]):
                seconds = flops / (0.4 * 989e12)
                assert is_rounded(time[1], seconds / {"h": 3600, "days": 86_400}[time[2]])
    text = re.sub(r"\\\n +", "", text)  # long commands have two lines
    for command in re.findall(r"python prepare\.py (.+?)(?:   |\n)", text):
        options, _ = read_config(PrepareConfig, shlex.split(command), positional="corpus")
        assert (options.name or options.corpus) == load(name).dataset


@every_preset
def test_a_small_copy_trains(name, run, tmp_path):
    c = load(name)
    small = dict(n_layer=2, n_head=2, n_embd=24, block_size=32, batch_size=2, max_iters=2,
                 gradient_accumulation_steps=2, warmup_iters=0, log_interval=1, eval_interval=2,
                 dataset="easy", parallel="ddp")  # in this process
    if c.head_dim:
        small["head_dim"] = 8  # hourglass attention stays narrower than the residual stream
    if c.ffn_hidden:
        small["ffn_hidden"] = 20 if c.ffn == "hourglass" else 48
    records = run(tmp_path, str(PRESETS[name]), f"--out_dir={tmp_path}", "--device=cpu",
                  "--dtype=float32", *option_words(**small))
    assert [r["type"] for r in records] == ["config", "eval", "train", "train", "eval"]
    assert records[-1]["val_loss"] < records[1]["val_loss"]
    for option in ("template", "ffn", "norm", "optimizer", "schedule"):
        assert records[0][option] == getattr(c, option)
