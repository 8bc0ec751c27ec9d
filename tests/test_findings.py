"""tools/findings.py: the statistics, the table, the curves."""

import numpy as np
import pytest

from tools import findings


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (11, 2.201),
                                   (15, 2.131), (30, 2.042), (120, 1.980)])  # printed tables
def test_t_quantiles(df, t):
    assert findings.t_quantile(df) == pytest.approx(t, abs=6e-4)


def test_paired_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    losses, first = [1.02, 0.97, 1.05, 1.01, 0.99], [1.00, 0.98, 1.01, 1.00, 0.95]
    mean, half = findings.paired(dict(enumerate(losses)), dict(enumerate(first)))
    interval = stats.ttest_rel(losses, first).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high), abs=1e-5)


def test_only_seeds_that_both_have_are_paired():
    """Without pairing, seed 9 alone would make the difference."""
    mean, half = findings.paired({1: 1.5, 2: 2.5, 9: -90.0}, {1: 1.0, 2: 2.0, 7: 3.0})
    assert mean == 0.5 and half == 0
    assert findings.paired({1: 1.5, 9: 3.0}, {1: 1.0}) is None


@pytest.mark.parametrize("difference, words", [
    ((-0.1, 0.09), "lower"), ((0.1, 0.09), "higher"), ((-0.1, 0.11), "no difference shown"),
    ((0.0, 0.0), "no difference shown"), (None, "one seed")])
def test_an_interval_with_zero_is_no_difference(difference, words):
    assert findings.verdict(difference) == words


def test_a_studys_curves_over_seconds_are_means_over_its_seeds(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    made, real = [], figures.Figure.__init__
    monkeypatch.setattr(figures.Figure, "__init__", lambda self, *args, **options: (
        made.append(self), real(self, *args, **options))[1])
    runs = [{"variant": "a", "steps": 2, "seconds": s, "curve": [[0, 5.0], [1, loss], [2, 1.0]]}
            for s, loss in ((8.0, 2.0), (16.0, 3.0))]
    findings.draw_curves(runs, str(tmp_path / "x.png"), "seconds")
    (line,) = made[0].axes[0].lines
    assert tuple(np.asarray(line.get_data()).tolist()) == ([0, 6, 12], [5, 2.5, 1])
