"""tools/findings.py: the statistics, the tables, the curves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tools import findings


def study(losses, blocks=None, **options):
    """The comparisons of these final losses: variant -> those of its seeds."""
    runs = [{"variant": name, "seed": seed, "val_loss": loss} | (
        {} if blocks is None else {"blocks": blocks[name]})
        for name, values in losses.items() for seed, loss in enumerate(values)]
    planned = {name: SimpleNamespace(**{"pairs": (), "margin": None, "seeds": 1} | options)
               for name in losses}
    return findings.comparisons(runs, planned)


@pytest.mark.parametrize("df, t95, t90", [
    (1, 12.706, 6.314), (2, 4.303, 2.920), (4, 2.776, 2.132), (5, 2.571, 2.015),
    (10, 2.228, 1.812), (30, 2.042, 1.697), (120, 1.980, 1.658)])  # printed tables
def test_t_quantiles(df, t95, t90):
    assert findings.t_quantile(0.95, df) == pytest.approx(t95, abs=6e-4)
    assert findings.t_quantile(0.9, df) == pytest.approx(t90, abs=6e-4)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2; then 0.04 x 1, which is not below the one before."""
    assert findings.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert findings.holm([0.9, 0.8]) == [1, 1] and findings.holm([]) == []


def test_a_comparison_by_hand():
    """Variances 0.01, 0.0225 and 0.01, pooled 0.014167 with 6 degrees of freedom (t 2.4469); p of b
    against a, of t = 2.0580, is 0.0853."""
    losses = {"a": (1.0, 1.1, 1.2), "b": (1.15, 1.3, 1.45), "c": (0.9, 1.0, 1.1)}
    b, c, pair = study(losses, pairs=("b - c", "b - absent", "b - a"))
    assert [(d.variant, d.less) for d in (b, c, pair)] == [("b", "a"), ("c", "a"), ("b", "c")]
    assert (b.mean, b.half) == (pytest.approx(0.2), pytest.approx(0.2378, abs=5e-5))
    assert b.p == pytest.approx(2 * 0.0853, abs=2e-4) and pair.p == pytest.approx(0.0644, abs=2e-4)
    assert c.half == pytest.approx(b.half) and b.verdict == "undecided"
    (once,) = study({"a": [1.0], "b": [1.5]})
    assert (once.mean, once.half, once.p, once.verdict) == (0.5, None, None, "one seed")


def test_a_variant_that_varies_more_has_its_own_variance():
    """By hand: 100 / 4 + 1 / 4 with Welch's freedom, 25.25^2 / (25^2 / 3 + 0.25^2 / 6) = 3.06."""
    wild, calm = (-10, 10, -10, 10), (-1, 1, -1, 1)
    scale = math.sqrt(3 / 4)  # so that the variances are 100 and 1
    losses = {"a": calm, "b": wild, "c": calm}
    b, c = study({name: [scale * v for v in values] for name, values in losses.items()})
    assert c.half == pytest.approx(2.4469 * math.sqrt(1 / 2), abs=1e-3)
    assert b.half == pytest.approx(3.1824 * math.sqrt(25.25), abs=1e-2)


@pytest.mark.parametrize("mean, half90, p, margin, verdict", [
    (-0.1, 0.05, 0.01, None, "**better**"), (0.1, 0.05, 0.05, None, "**worse**"),
    (-0.1, 0.05, 0.051, None, "undecided"), (-0.1, 0.05, 0.5, 0.151, "equal"),
    (-0.1, 0.05, 0.01, 0.151, "equal"), (0.1, 0.05, 0.5, 0.149, "undecided"),
    (0.1, 0.05, 0.01, 0.149, "**worse**")])
def test_verdicts(mean, half90, p, margin, verdict):
    c = findings.Comparison("a", "b", mean, 0.06, half90, p=p)
    c.judge(margin)
    assert c.verdict == verdict


@pytest.mark.parametrize("spreads", [(1, 1, 1, 1, 1), (1, 1, 1, 1, 6)])
def test_intervals_hold_what_they_promise(spreads):
    """In 600 studies where nothing differs 95 % of the intervals have zero, and at most 5 % of the
    studies a bold verdict, whatever the last one's spread; of those that differ by the margin 5 %
    at most are called equal."""
    rng, inside, bold, equal, studies = np.random.default_rng(0), 0, 0, 0, 600
    for _ in range(studies):
        losses = {f"v{i}": spread * rng.standard_normal(5) for i, spread in enumerate(spreads)}
        found = study(losses)
        inside += sum(abs(c.mean) <= c.half for c in found)
        bold += any("**" in c.verdict for c in found)
        losses["v1"] += 2.5
        equal += study(losses, margin=2.5)[0].verdict == "equal"
    assert 0.935 < inside / studies / len(found) < 0.97
    assert bold / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert 0.02 < equal / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_the_texts_noise():
    """Of independent blocks it is their standard error; what both variants share cancels."""
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 32))
    shared = 100 * rng.standard_normal(32)
    expected = np.std(one - other) / math.sqrt(32)
    (c,) = study({"a": [1.0], "b": [1.0]}, {"a": list(one + shared), "b": list(other + shared)})
    assert c.text == pytest.approx(expected, rel=0.03)
    assert c.text == findings.text_noise(one + shared, other + shared)  # the same each time
    assert findings.differences([c])[0]["text"] == f"{c.text:.4f}"
    for blocks in (None, {"a": [1.0], "b": [2.0]}):  # one says nothing of others
        assert "text" not in findings.differences(study({"a": [1.0], "b": [1.0]}, blocks))[0]


def test_a_studys_curves_over_seconds_are_means_over_its_seeds(tmp_path, drawn):
    """What a legend says is where its curve ends, whatever the final loss, of half the text, is. A
    family has one color and one panel, where no two lines look alike."""
    names = "a (GPT)", "b", "c", "d", "e", "f", "g, x", "a, x", *(f"g, {i}" for i in range(9))
    runs = [{"variant": name, "steps": 2, "seconds": s, "val_loss": 0.9,
             "curve": [[0, 5.0], [1, loss], [2, 1.0]]}
            for name in names for s, loss in ((8.0, 2.0), (16.0, 3.0))]
    findings.draw_curves(runs, str(tmp_path / "x.png"), "seconds", "nats per byte")
    line, *_ = drawn[0].axes[0].lines
    assert tuple(np.asarray(line.get_data()).tolist()) == ([6, 12], [2.5, 1])  # the second half
    panels = [axes.lines for axes in drawn[0].axes]
    assert [len(panel) for panel in panels] == [7, 8, 4]
    assert all(panel[0].get_label() == "a (GPT): 1.0000" for panel in panels)
    assert len({line.get_color() for panel in panels[1:] for line in panel[1:]}) == 1
    assert (panels[0][1].get_label(), panels[0][1].get_color()) == ("a, x: 1.0000", "k")
    assert len({(line.get_color(), line.get_marker()) for line in panels[1]}) == 8
    assert "nats per byte" in drawn[0].axes[1].get_ylabel()


def test_a_studys_differences_are_drawn_by_seed_and_without_the_scale_of_one(tmp_path, drawn):
    """Ticks are of runs with one seed; a variant far away has its number; marks tell the rest."""
    losses = {"a": (1.0, 1.1, 1.2), "b": (0.9, 1.0, 1.1), "c": (1.05, 1.02, 1.23),
              "far": (9.0, 9.1, 9.2)}
    found = study(losses, margin=0.1)
    assert found[1].seeds == pytest.approx((0.05, -0.08, 0.03))
    found[0].verdict = "equal"
    findings.draw_differences(found, str(tmp_path / "x.png"), 0.1, "nats per byte")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == [f"+8.000 ± {found[2].half:.3f} → "]
    assert -0.5 < axes.get_xlim()[0] < axes.get_xlim()[1] < 0.5
    assert {line.get_marker() for line in axes.lines} >= {"s", "o", "^"}
