"""support/muon.py: torch's Muon, all matrices of a shape at once, shared out over processes."""

import pytest
import torch

from support import muon

OPTIONS = dict(lr=0.1, weight_decay=0.3, momentum=0.95, nesterov=True, ns_steps=5)
SHAPES = [(32, 8), (8, 32), (16, 16), (16, 16), (8, 32), (16, 16), (1, 5)]


def test_muon_is_torchs():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    expected, found = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a, b = torch.optim.Muon(expected, **OPTIONS), muon.Muon(found, **OPTIONS)
    for _ in range(3):
        for p, q in zip(expected, found, strict=True):
            p.grad = torch.randn_like(p) @ torch.diag(torch.linspace(0.01, 3, p.size(1)))
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, before in zip(expected, found, start, strict=True):
        assert (p - q).norm() < 0.01 * (p - before).norm()  # bf16 rounds
        torch.testing.assert_close(b.state[q], a.state[p])


@pytest.mark.parametrize("world, shares", [(2, [2, 1]), (3, [1, 1, 1]), (5, [1, 1, 1, 0, 0])])
def test_the_matrices_are_shared_out(world, shares, monkeypatch):
    """Over processes, played here one after the other; test_ranks.py has real ones."""
    x, parts, done = torch.randn(3, 4, 5), [], []

    def double(share):
        done.append(len(share))
        return 2 * share

    def gather(whole, part):
        parts.append(part)
        assert [w.shape for w in whole] == [part.shape] * world

    monkeypatch.setattr(muon.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(muon.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(muon.dist, "all_gather", gather)
    for rank in range(world):
        monkeypatch.setattr(muon.dist, "get_rank", lambda rank=rank: rank)
        assert muon.share_out(double, x).shape == x.shape
    assert torch.equal(torch.cat(parts)[:3], 2 * x) and done == shares
