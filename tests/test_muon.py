"""support/muon.py: torch's Muon, all matrices of a shape at once, shared out over processes."""

import math

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
def test_muon_is_torchs_and_as_described(world, monkeypatch):
    """The description: Nesterov momentum of 0.95, 5 quintic steps of Newton-Schulz in bf16, scaled
    by sqrt(max(1, rows / columns))."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    sizes = play_ranks(world, monkeypatch) if world > 1 else []
    expected, found = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    described, momenta = [p.clone() for p in start], [torch.zeros_like(p) for p in start]
    a, b = torch.optim.Muon(expected, **OPTIONS), muon.Muon(found, **OPTIONS)
    for _ in range(3):
        for i, (p, q) in enumerate(zip(expected, found, strict=True)):
            gradient = torch.randn_like(p) @ torch.diag(torch.linspace(0.01, 3, p.size(1)))
            p.grad, q.grad = gradient, gradient.clone()
            momenta[i] = 0.95 * momenta[i] + gradient
            x = (gradient + 0.95 * momenta[i]).bfloat16()
            x = x.T if p.size(0) > p.size(1) else x
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = (x.T if p.size(0) > p.size(1) else x).float()
            scale = math.sqrt(max(1, p.size(0) / p.size(1)))
            described[i] = (1 - 0.1 * 0.3) * described[i] - 0.1 * scale * x
        a.step()
        b.step()
    for p, q, weight, before in zip(expected, found, described, start, strict=True):
        assert (p - q).norm() < 0.01 * (p - before).norm()  # bf16 rounds
        assert (q - weight).norm() < 0.05 * q.norm()
        torch.testing.assert_close(b.state[q], a.state[p])
    assert max(sizes, default=0) <= -(-3 // world)  # of the three matrices of a shape
