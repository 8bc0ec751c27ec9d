"""Every preset in config/: it loads, its counts and its recipe are the papers', its docstring says
what it costs, and a small copy of it trains."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from processes import run_ranks

import train
from config import read_config
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
PRESETS = {p.stem: p for p in sorted((ROOT / "config").glob("*.py")) if p.stem != "__init__"
           and not p.stem.startswith("study_")}  # which tests/test_compare.py has
every_preset = pytest.mark.parametrize("name", PRESETS)

# GPT: L (12 d^2 + 2 d) + V d + T d + d. Velocity tables: (V + T) d; velocity norms: 2 L d; scalars:
# 4, 6 or 8 a layer. SwiGLU and hourglass: N + L (2 d_a + K d + d) + d + V d.
PARAMETERS = {
    "gpt2_124m": 124_373_760,
    "gpt_tinystories": 124_373_760,
    "gpt_owt": 124_373_760,
    "gpt_owt_medium": 354_599_936,
    "polyak_tinystories": 163_812_144,
    "yurii_tinystories": 163_812_168,
    "yurii_owt": 163_812_168,
    "yurii_owt_tuned": 163_812_168,
    "yurii_owt_medium": 407_209_104,
    "tmm_tinystories": 163_812_192,
    "tmm_owt": 163_812_192,
    "shakespeare_char": 10_745_088,  # V = 65
    "shakespeare_char_fast": 402_688,  # V = 65; nanoGPT's CPU recipe has 804,096
    "swiglu_113m": 151_917_312,
    "hourglass_113m": 176_405_280,
    "swiglu_400m": 454_263_808,
    "hourglass_400m": 487_664_768,
    "swiglu_906m": 1_060_259_328,  # V = 100,352 from here on
    "hourglass_906m": 1_159_291_584,
    "swiglu_3b": 3_479_522_304,
    "hourglass_3b": 3_539_145_168,
    "swiglu_8b": 8_196_198_400,
    "hourglass_8b": 8_289_531_008,
    "hourglass_yurii_owt": 239_199_684,  # V = 50,304; no position tables, so none for V either
}
MATRICES = {  # N = L (4 d d_a + 3 K d d_h)
    "swiglu_113m": 113_246_208, "hourglass_113m": 113_577_984,
    "swiglu_400m": 402_653_184, "hourglass_400m": 403_832_832,
    "swiglu_906m": 905_969_664, "hourglass_906m": 908_623_872,
    "swiglu_3b": 3_170_893_824, "hourglass_3b": 3_167_797_248,
    "swiglu_8b": 7_784_628_224, "hourglass_8b": 7_787_839_488,
}
SMALL = dict(batch_size=30, gradient_accumulation_steps=16, block_size=1024, optimizer="muon",
             learning_rate=6e-4, min_lr=6e-5, muon_weight_decay=0.0, weight_decay=0.1,
             scalar_lr=None, grad_clip=1.0, schedule="cosine", eval_interval=100,
             eval_tokens=4_915_200, dropout=0.0, bias=False, residual_init_scale=True,
             norm="layernorm", position="learned")
STORIES = dict(SMALL, dataset="tinystories", max_iters=10_000, warmup_iters=1000, muon_lr=0.02)
WEB = dict(SMALL, dataset="openwebtext", max_iters=30_000, warmup_iters=3000, muon_lr=0.004)
MEDIUM = dict(WEB, muon_lr=0.006, n_layer=24, n_head=16, n_embd=1024)
LLAMA = dict(optimizer="adamw", weight_decay=0.1, schedule="cosine", grad_clip=1.0, norm="rmsnorm",
             position="rope", rope_theta=500_000.0, qk_norm=True, residual_init_scale=False,
             bias=False, dropout=0.0, min_lr=6e-5, warmup_iters=100)
RECIPES = {
    "gpt2_124m": dict(batch_size=12, gradient_accumulation_steps=40, block_size=1024,
                      max_iters=600_000, lr_decay_iters=None, warmup_iters=2000, min_lr=6e-5,
                      learning_rate=6e-4, weight_decay=0.1, optimizer="adamw", template="gd"),
    "shakespeare_char": dict(batch_size=64, gradient_accumulation_steps=1, block_size=256,
                             n_layer=6, n_head=6, n_embd=384, dropout=0.2, learning_rate=1e-3,
                             max_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
                             always_save_checkpoint=False),
    "shakespeare_char_fast": dict(batch_size=64, gradient_accumulation_steps=1, block_size=32,
                                  n_layer=2, n_head=4, n_embd=128, position="rope", qk_norm=True,
                                  optimizer="muon", max_iters=170, schedule="wsd", min_lr=0.0,
                                  beta2=0.99),
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
    "hourglass_yurii_owt": LLAMA | WEB | dict(template="nesterov", norm="rmsnorm", position="rope",
                                              residual_init_scale=False),
    **{f"{kind}_906m": dict(LLAMA, max_iters=4292, learning_rate=2.5e-4, warmup_iters=25)
       for kind in ("swiglu", "hourglass")},
    **{f"{kind}_3b": dict(LLAMA, max_iters=14_305, learning_rate=1.6e-4)
       for kind in ("swiglu", "hourglass")},
    **{f"{kind}_8b": dict(LLAMA, max_iters=23_842, learning_rate=1.2e-4)
       for kind in ("swiglu", "hourglass")},
}
TOKENS = {"_906m": 18.0e9, "_3b": 60.0e9, "_8b": 100.0e9}  # and steps of 1024 x 4096


def load(name, *argv):
    return read_config(train.TrainConfig, [str(PRESETS[name]), *argv])[0]


def architecture(c) -> GPTConfig:
    """With the vocabulary that the preset's data has."""
    sizes = {"shakespeare_char": 65, "fineweb_edu_cl100k": 100_352, "pydoc": 257,
             "tinystories_bytes": 257}
    return GPTConfig(**train.model_args(c) | {
        "vocab_size": c.vocab_size or sizes.get(c.dataset, 50_304)})


def widths(c):
    """L, d, d_a, the weights of a layer's attention and FFN matrices, without model.py."""
    L, d, d_a = c.n_layer, c.n_embd, c.n_head * (c.head_dim or c.n_embd // c.n_head)
    hidden = c.ffn_hidden or 4 * d
    ffn = {"mlp": 2, "swiglu": 3, "hourglass": 3 * c.ffn_depth}[c.ffn] * d * hidden
    return L, d, d_a, 4 * d * d_a, ffn


def test_the_tables_above_name_presets():
    assert PARAMETERS.keys() | MATRICES.keys() | RECIPES.keys() <= PRESETS.keys()
    assert len(PRESETS) >= 20


@every_preset
def test_counts(name):
    c = load(name)
    with torch.device("meta"):
        model = GPT(architecture(c))
    L, _, d_a, attention, ffn = widths(c)
    matrices = sum(p.numel() for p in model.parameter_roles()["matrix"].values())
    assert matrices == L * (attention + ffn) == MATRICES.get(name, matrices)
    total = model.get_num_params(non_embedding=False)
    assert total == PARAMETERS.get(name, total)


@pytest.mark.parametrize("size", ["113m", "400m", "906m", "3b", "8b"])
def test_the_hourglass_pairs_differ_in_nothing_but_shape(size):
    base, hourglass = load(f"swiglu_{size}"), load(f"hourglass_{size}")
    shape = {"out_dir", "n_layer", "n_embd", "n_head", "head_dim", "ffn", "ffn_hidden", "ffn_depth"}
    assert {k for k in vars(base) if getattr(base, k) != getattr(hourglass, k)} <= shape
    assert abs(MATRICES[f"hourglass_{size}"] / MATRICES[f"swiglu_{size}"] - 1) < 0.004
    assert widths(base)[2] == widths(hourglass)[2]  # the attention width is kept
    assert hourglass.ffn_depth == 4 and hourglass.ffn_hidden < hourglass.n_embd


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    c = load(name)
    assert {k: getattr(c, k) for k in RECIPES[name]} == RECIPES[name]
    assert (c.beta1, c.decay_lr, c.velocity_init, c.velocity_norm) == (0.9, True, "embed", "update")
    assert c.beta2 == RECIPES[name].get("beta2", 0.95)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.endswith(tuple(TOKENS))])
def test_the_papers_token_budgets(name):
    c = load(name)
    step = c.batch_size * c.gradient_accumulation_steps * c.block_size
    budget = TOKENS["_" + name.split("_")[1]]
    assert step == 1024 * 4096 and c.block_size == 4096
    assert abs(step * c.max_iters - budget) < step


@every_preset
def test_the_docstring_says_what_it_costs(name):
    """What it is, its cost and what to expect; the numbers are those of the settings."""
    text = PRESETS[name].read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring and docstring.split("\n\n")[0].endswith(".")
    fields = dict(re.findall(r"^(\w+): +(.+)", docstring, re.MULTILINE))
    assert {"Cost", "Expected"} <= fields.keys()
    assert max(map(len, text.splitlines())) <= 100
    c, (L, d, d_a, attention, ffn) = load(name), widths(load(name))
    tokens = c.batch_size * c.gradient_accumulation_steps * c.block_size * c.max_iters
    flops = tokens * 3 * (L * 2 * (attention + ffn + c.block_size * d_a)
                          + 2 * architecture(c).vocab_size * d)
    if said := re.match(r"(\S+) ([MG]) tokens, (\S+) FLOP", fields["Cost"]):
        assert is_rounded(said[1], tokens / {"M": 1e6, "G": 1e9}[said[2]])
        assert is_rounded(said[3], flops)
    if said := re.search(r"(\S+) (h|days) (?:on|of) one H100 at 40 % MFU", fields["Cost"]):
        hours = flops / (0.4 * 989e12) / 3600
        assert is_rounded(said[1], hours / {"h": 1, "days": 24}[said[2]])


def is_rounded(said: str, value: float) -> bool:
    """Is "1.2e19" (any number of digits) the value, rounded?"""
    mantissa, _, exponent = said.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(said) - value) <= 0.51 * unit


@every_preset
def test_the_data_can_be_made_as_it_says(name):
    """The docstring's `python prepare.py ...` is a command of prepare.py for this data set."""
    import prepare

    text = re.sub(r"\\\n +", "", PRESETS[name].read_text())  # long commands have two lines
    for line in re.findall(r"python prepare\.py (.+?)(?:   |\n)", text):
        argv = shlex.split(line)
        options, _ = read_config(prepare.PrepareConfig, argv, positional="corpus")
        assert (options.name or options.corpus) == load(name).dataset


@every_preset
def test_every_run_has_its_own_folder(name):
    assert load(name).out_dir == f"out-{name.replace('_', '-')}"


@every_preset
def test_a_small_copy_trains(name, words, run, tmp_path):
    c = load(name)
    small = dict(n_layer=2, n_head=2, n_embd=24, block_size=32, batch_size=2, max_iters=2,
                 gradient_accumulation_steps=2, warmup_iters=1, log_interval=1, eval_interval=2)
    if c.head_dim:
        small["head_dim"] = 8  # hourglass attention stays narrower than the residual stream
    if c.ffn_hidden:
        small["ffn_hidden"] = 20 if c.ffn == "hourglass" else 48
    argv = [str(PRESETS[name]), *[f"--{k}={v}" for k, v in small.items()],
            f"--out_dir={tmp_path}", "--dataset=easy", "--device=cpu", "--dtype=float32"]
    if c.parallel == "fsdp":
        run_ranks([*words(tmp_path), *argv])
        log = (tmp_path / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in log]
    else:
        records = run(tmp_path, *argv)
    assert [r["type"] for r in records] == ["config", "eval", "train", "train", "eval"]
    assert records[-1]["val_loss"] < records[1]["val_loss"]
    assert {k: records[0][k] for k in ("template", "ffn", "norm", "optimizer", "schedule")} == {
        k: getattr(c, k) for k in ("template", "ffn", "norm", "optimizer", "schedule")}
