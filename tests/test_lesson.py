"""The notebooks of docs/ run from top to bottom, print what they say, and show what they claim.

A cell tagged `varies` prints what depends on Python's help texts and on the training; all others
must print what is saved in the notebook. After a change: run it in Jupyter, and save it.
"""

import contextlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import model

plt = pytest.importorskip("matplotlib.pyplot")
DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = re.compile(r"^STEPS = \d+", re.MULTILINE)


def read(name: str) -> tuple[list[dict], str]:
    """The cells of a notebook, and its text."""
    cells = json.loads((DOCS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return cells, re.sub(r"\s+", " ", text)


@pytest.fixture
def execute(monkeypatch):
    """Run a notebook's cells in one namespace, which is returned."""
    def run(name: str, steps: int | None = None) -> dict:
        names = {"__name__": "__main__"}
        for number, cell in enumerate(read(name)[0], 1):
            if cell["cell_type"] == "markdown":
                continue
            code = "".join(cell["source"])
            if steps:
                code = STEPS.sub(f"STEPS = {steps}", code)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, f"{name}.ipynb, cell {number}", "exec"), names)
            saved = "".join(text for out in cell["outputs"] for text in out.get("text", ()))
            if "varies" not in cell["metadata"].get("tags", ()):
                assert printed.getvalue() == saved, f"{name}.ipynb, cell {number}: what is saved"
            pictures = sum("image/png" in out.get("data", ()) for out in cell["outputs"])
            assert len(plt.get_fignums()) == pictures, f"{name}.ipynb, cell {number}: pictures"
            for figure in plt.get_fignums():
                plt.figure(figure).canvas.draw()
            plt.close("all")
        return names

    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(model, "TEMPLATES", dict(model.TEMPLATES))
    with plt.rc_context():
        plt.switch_backend("agg")
        yield run


def textbook_path(L: float, m: float, method: str, x, n: int):
    """Nesterov's method and triple momentum in the letters of their sources."""
    rho = 1 - math.sqrt(m / L)
    beta = (1 - math.sqrt(m / L)) / (1 + math.sqrt(m / L))
    alpha, gamma = 1 / L, beta
    if method == "tmm":
        alpha, beta = (1 + rho) / L, rho**2 / (2 - rho)
        gamma = rho**2 / ((1 + rho) * (2 - rho))
    before, xs = x, [x]
    for _ in range(n - 1):
        y = x + gamma * (x - before)
        x, before = x + beta * (x - before) - alpha * torch.tensor([m, L]) * y, x
        xs.append(x)
    return torch.stack(xs)


def stated(lesson: dict) -> dict[str, bool]:
    """Words of the lesson -> whether the cells have computed that."""
    steps, kinked = lesson["valley_steps"], lesson["kinked_steps"]
    circle = lesson["kinked_runs"]["polyak"]
    runs, start = lesson["valley_runs"], torch.tensor([4.0, 1.0]).double()
    gd, nesterov = (lesson["models"][name, 1].get_num_params(non_embedding=False)
                    for name in ("gd", "nesterov"))
    turn = {name: sum(angles[0]) / len(angles[0]) for name, angles in lesson["turns"].items()}
    state = tuple(torch.randn(2, 1, 3, 4))
    written, built_in = (frozen(model.GPTConfig(n_head=1, n_embd=4), 0, 0)(torch.tanh, state)[0]
                         for frozen in (lesson["Frozen"], model.Frozen))
    return {
        "Heavy ball wins": min(steps, key=steps.get) == "polyak",
        "runs in a circle for ever":
            torch.allclose(circle[-1], circle[-4]) and circle[-4:].abs().max() > 1,
        "the methods with look-ahead arrive": max(kinked["nesterov"], kinked["tmm"]) < 100,
        "Nesterov's 2 steps": kinked["nesterov"] == 2,
        "the same when $\\mu = \\beta$": torch.allclose(
            runs["nesterov"], textbook_path(25, 1, "nesterov", start, 1000), atol=1e-6),
        "$\\alpha$ is our $\\gamma$, its $\\beta$ our $\\beta$, its $\\gamma$ our $\\mu$":
            torch.allclose(runs["tmm"], textbook_path(25, 1, "tmm", start, 1000), atol=1e-6),
        "here 1.41": f"{lesson['last_steps']['update']:.2f}" == "1.41",
        "`model.py` has this control": torch.equal(written, built_in),
        "8 % more parameters": round(100 * nesterov / gd) == 108,
        "`nesterov` turns by about 1 degree": turn["nesterov"] < 1.5,
        "`frozen` by some 37": 32 < turn["frozen"] < 42,
    }


def learned(lesson: dict) -> dict[str, bool]:
    """The same, of what training at full length shows."""
    share = {name: sum(values) / len(values) for name, values in lesson["shares"].items()}
    before, turn = ({name: sum(angles[when]) / len(angles[when])
                     for name, angles in lesson["turns"].items()} for when in (0, 1))
    one, two = (lesson["curves"]["gd", seed] for seed in (1, 2))
    apart = [one[step] - two[step] for step in one]
    return {
        "about half in `nesterov`, and little in `frozen`":
            0.4 < share["nesterov"] < 0.7 and share["frozen"] < 0.25,
        "some 30 degrees": 20 < turn["nesterov"] < 40,
        "nearly at a right angle": 80 < turn["frozen"] < 105,
        "as in `gd` all along": all(80 < of["gd"] < 105 for of in (before, turn)),
        "on the way they part and cross":
            max(map(abs, apart)) > 0.02 and min(apart) < 0 < max(apart),
    }


@pytest.mark.parametrize("name", ["lesson", "answers"])
def test_links_and_size(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", read(name)[1]):
        assert (DOCS / target).exists(), target
    assert (DOCS / f"{name}.ipynb").stat().st_size < 600_000


@pytest.mark.parametrize("name", ["lesson", "answers"])
def test_colab_clones_once(name, tmp_path, monkeypatch):
    """The first cell may run again, and after a restart, which begins in the folder above."""
    first = next("".join(c["source"]) for c in read(name)[0] if c["cell_type"] == "code")
    cloned = []

    def run(words, check):
        if "clone" in words:
            cloned.append(os.mkdir(words[-1]))
            open(f"{words[-1]}/model.py", "x").close()

    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr("subprocess.run", run)
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            exec(first, {})
            assert os.path.exists("model.py")
    assert len(cloned) == 1


@pytest.mark.parametrize("steps", [1, pytest.param(None, marks=pytest.mark.torture)])
def test_lesson(execute, steps):
    lesson, (_, text) = execute("lesson", steps), read("lesson")
    for words, holds in (stated(lesson) | ({} if steps else learned(lesson))).items():
        assert words in text and holds, words
    assert all(len(curve) == (steps or 10) for curve in lesson["curves"].values())


@pytest.mark.parametrize("steps", [1, pytest.param(None, marks=pytest.mark.torture)])
def test_answers(execute, steps):
    answers, (_, text) = execute("answers", steps), read("answers")
    for words in (f"{answers['parameters']:,} parameters", f"{answers['flops'] / 1e6:.0f} million",
                  f"attention has {answers['skew']['attention']:.1f}",
                  f"takes {answers['taken']} steps"):
        assert words in text, words
    for name, of_seeds in answers["losses"].items():
        assert len(of_seeds) == 2 and all(map(math.isfinite, of_seeds)), name
