"""support/muon.py: torch's Muon, all matrices of a shape at once, shared out over processes."""

import pytest
import torch

from support import muon

OPTIONS = dict(lr=0.1, weight_decay=0.3, momentum=0.95, nesterov=True, ns_steps=5)
SHAPES = [(32, 8), (8, 32), (16, 16), (16, 16), (8, 32), (16, 16), (1, 5)]


def play_ranks(world, monkeypatch) -> list[int]:
    """share_out as in `world` processes, played here one after the other; the list gets the number
    of matrices that each Newton-Schulz iteration has."""
    sizes, share_out, newton_schulz = [], muon.share_out, muon.newton_schulz
    monkeypatch.setattr(muon.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(muon.dist, "get_world_size", lambda: world)

    def played(function, x):
        parts = []

        def keep(whole, part):
            parts.append(part.clone())

        monkeypatch.setattr(muon.dist, "all_gather_into_tensor", keep)
        for rank in range(world):
            monkeypatch.setattr(muon.dist, "get_rank", lambda rank=rank: rank)
            share_out(function, x)
        monkeypatch.setattr(muon.dist, "all_gather_into_tensor",
                            lambda whole, part: whole.copy_(torch.cat(parts)))
        return share_out(lambda share: share, x)

    def counted(x, group):
        sizes.append(len(x))
        return newton_schulz(x, group)

    monkeypatch.setattr(muon, "share_out", played)
    monkeypatch.setattr(muon, "newton_schulz", counted)
    return sizes


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_muon_is_torchs(world, monkeypatch):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    sizes = play_ranks(world, monkeypatch) if world > 1 else []
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
    assert max(sizes, default=0) <= -(-3 // world)  # of the three matrices of a shape
