"""Muon, with the Newton-Schulz iteration of all matrices of a shape at once."""

from collections.abc import Callable

import torch
import torch.distributed as dist


def newton_schulz(x: torch.Tensor, group: dict) -> torch.Tensor:
    """Each of the matrices x (n, rows, columns), rows <= columns, made nearly orthogonal, in bf16:
    torch.optim.Muon's iteration on all of them at once."""
    a, b, c = group["ns_coefficients"]
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, to bf16's rounding, but with Newton-Schulz of all matrices of a shape at
    once, divided over the processes: each does its share and gives it to the others. (torch's goes
    one matrix at a time, and every process does all of them.)"""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list] = {}  # rows <= columns -> matrices and their updates
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                update = update.mT if p.size(0) > p.size(1) else update
                shapes.setdefault(update.shape, []).append((p, update))
            for pairs in shapes.values():
                updates = share_out(lambda x, g=group: newton_schulz(x, g),
                                    torch.stack([update for _, update in pairs]).bfloat16())
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.mT if p.size(0) > p.size(1) else update,
                           alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def share_out(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """function(x), its rows divided over the processes; every process gets the whole result."""
    if not dist.is_initialized():
        return function(x)
    rank, world = dist.get_rank(), dist.get_world_size()
    n = -(-len(x) // world)
    part = torch.zeros(n, *x.shape[1:], dtype=x.dtype, device=x.device)
    share = x[rank * n:(rank + 1) * n]  # perhaps of none
    part[:len(share)] = function(share)
    whole = x.new_empty(n * world, *x.shape[1:])
    dist.all_gather(list(whole.chunk(world)), part)
    return whole[:len(x)]
