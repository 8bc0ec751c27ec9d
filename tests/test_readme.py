"""The README tells the truth: its example runs, its commands parse; and the code is ruff-clean."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal

import pytest
import torch

import model
from bench import BenchConfig
from prepare import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = {"train.py": TrainConfig, "sample.py": SampleConfig, "prepare.py": PrepareConfig,
           "bench.py": BenchConfig}


def test_ruff():
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def friction(monkeypatch):
    """The README's template of your own, added as the README says."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.setattr(model, "TEMPLATES", dict(model.TEMPLATES))
    monkeypatch.setitem(model.GPTConfig.__annotations__, "template", Literal["gd", "friction"])
    exec(code, vars(model).copy())
    assert len(code.split("TEMPLATES[")[0].strip().splitlines()) <= 15
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=16,
                                     bias=False, template="friction")).double()


def test_the_template_of_your_own(friction):
    """It is its equation, it learns gamma, and it decodes with a cache."""
    idx = torch.randint(32, (2, 16))
    full, loss = friction(idx, idx)
    loss.backward()
    t, (x, v) = friction.transformer, friction.embed(idx)
    for block in t.h:
        for step, oracle in zip(block.steps, (lambda z, b=block: b.attn(b.ln_1(z)),
                                              lambda z, b=block: b.mlp(b.ln_2(z))), strict=True):
            v = 0.9 * v + torch.log1p(torch.exp(step.gamma)) * oracle(x)
            x = x + v
            assert step.gamma.grad.abs() > 0
    assert torch.allclose(friction.lm_head(t.ln_f(x)), full, atol=1e-12)
    cache = model.KVCache(16)
    for i in range(16):
        logits, _ = friction(idx[:, i:i + 1], cache=cache)
    assert torch.allclose(logits[:, 0], full[:, -1], atol=1e-12)


def test_the_commands_name_what_there_is():
    """Every preset is mentioned, every preset and option of a command exists."""
    presets = {p.stem for p in (ROOT / "config").glob("[a-z]*.py")}
    table = README[README.index("## Presets"):README.index("## From nanoGPT")]
    named = set(re.findall(r"`(\w+)`", table))
    assert presets <= named, presets - named
    assert set(re.findall(r"config/(\w+)\.py", README)) <= presets
    commands = re.findall(r"(\w+\.py) ([^\n]*)", "\n".join(re.findall(
        r"```sh\n(.*?)```", README, re.DOTALL)))
    seen = 0
    for program, words in commands:
        if program in CONFIGS:
            known = {f.name for f in fields(CONFIGS[program])}
            options = set(re.findall(r"--(\w+)", words.split("#")[0])) - {"name", "help"}
            assert options <= known | {"nproc_per_node", "standalone"}, (program, options - known)
            seen += 1
    assert seen >= 12
