"""The fused path of a model with momentum: GPT.hidden by support/substep.py's operation.

It must never overrule what a fork changed in model.py, so before a run the loss and every gradient
of a batch are compared with the plain path's.
"""

import copy
from types import MethodType

import torch

from model import GPT, KVCache, Momentum
from support.errors import fail, reason
from support.substep import EPS, Substep, triton


def affine(norm: torch.nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and bias (C,) of a norm, also of one that has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (torch.ones_like(like) if weight is None else weight,
            torch.zeros_like(like) if bias is None else bias)


def hidden(model: GPT, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
    """GPT.hidden, in which what the next oracle reads travels beside x and v. Decoding, which has a
    cache, takes the plain path."""
    if cache is not None:
        return type(model).hidden(model, idx, cache)
    parts, config = model.transformer, model.config
    positions = KVCache().begin(idx, config.block_size)
    x, v = model.embed(idx, positions)
    rope = model.rope(positions)
    oracles = [f for block in parts.h for f in (lambda z, b=block: b.attn(z, rope), block.mlp)]
    steps = [step for block in parts.h for step in block.steps]
    norms = [norm for block in parts.h for norm in (block.ln_1, block.ln_2)] + [parts.ln_f]
    one = torch.ones_like(steps[0].scalar("beta"))
    mus = [step.scalar("mu") if "mu" in step.learned else 0 * one for step in steps] + [0 * one]
    converted = torch.is_autocast_enabled(x.device.type)  # by the next oracle, and so here
    z_dtype = torch.get_autocast_dtype(x.device.type) if converted else one.dtype
    z = norms[0](x + mus[0] * v)
    for oracle, step, norm, mu in zip(oracles, steps, norms[1:], mus[1:], strict=True):
        nu = step.scalar("nu") if "nu" in step.learned else one
        scalars = torch.cat((step.scalar("beta"), step.scalar("gamma"), nu, mu))
        columns = torch.stack((*affine(step.norm, norms[0].weight), *affine(norm, norms[0].weight)))
        has_norm = not isinstance(norm, torch.nn.Identity)
        x, v, z = Substep.apply(x, v, oracle(z), scalars, columns, has_norm,
                                config.norm == "rmsnorm", config.bias, z_dtype)
    return z


def serves(model: GPT) -> bool:
    """Whether `hidden` computes this model, if nobody changed its equations."""
    c, parts = model.config, model.transformer
    norms = [m for m in model.modules() if hasattr(m, "eps")]
    return (all(isinstance(step, Momentum) for block in parts.h for step in block.steps)
            and c.velocity_norm == "update" and c.splitting == "lie_trotter" and not c.each
            and c.norm_place == "pre"
            and not any(m._forward_hooks or m._forward_pre_hooks for m in parts.modules())
            and all(type(m).forward in (torch.nn.LayerNorm.forward, torch.nn.RMSNorm.forward)
                    and m.eps == EPS for m in norms)
            and model.lm_head.weight.dtype == torch.float32 and not model.activation_checkpointing)


def disagreement(model: GPT, device: torch.device) -> str:
    """"" where a batch's loss, gradients and random numbers are the plain path's, at parameters a
    little off their start, where none hides another by being zero; else what is wrong."""
    results, precision = [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        trial = copy.deepcopy(model)
        for part in (trial, *trial.transformer.h):
            part.narrow = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for p in trial.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.02)
            length = min(trial.config.block_size, 256)
            tokens = torch.randint(trial.config.vocab_size, (2, length), device=device)
            for path in (type(trial).hidden, hidden):
                trial.hidden = MethodType(path, trial)
                torch.manual_seed(0)  # the same dropout
                loss = trial(tokens, tokens.flip(1), return_logits=False)[1]
                loss.backward()
                drawn = torch.rand(1), torch.rand(1, device=device)  # equal if both drew as often
                results.append([loss.detach(), *drawn, *(p.grad for p in trial.parameters())])
                trial.zero_grad(set_to_none=True)
    except Exception as error:  # of parts that are not as `hidden` knows them, or of the kernel
        return f"the fused path fails: {reason(error)}"
    finally:
        torch.set_float32_matmul_precision(precision)
    size = max(g.norm() for g in results[0] if g is not None)
    same = all(a is b or (a is not None and b is not None
                          and (a - b).norm() <= 1e-4 * a.norm() + 1e-6 * size)
               for a, b in zip(*results, strict=True))
    return "" if same else "model.py computes something else than support/substep.py"


def fuse(model: GPT, wanted: bool | None, device: torch.device) -> str:
    """Give the model this path if it is wanted (None: on CUDA), serves and agrees. Returns which it
    takes and why, "" for a model without momentum."""
    why = ""
    if not isinstance(model.transformer.h[0].steps[0], Momentum) and not wanted:
        return ""
    if not serves(model):
        if wanted:
            fail("fused=True: serves polyak, nesterov and tmm with velocity_norm=update, "
                 "splitting=lie_trotter, ffn_substeps=joint, norm_place=pre, not in float64, "
                 "without hooks, activation_checkpointing or fsdp; use --fused=auto")
    elif wanted or (wanted is None and device.type == "cuda" and triton is not None):
        why = disagreement(model, device)
        if not why:
            model.hidden = MethodType(hidden, model)
            return "momentum fused"
    if device.type == "cuda":
        import torch._inductor.config as inductor

        if hasattr(inductor.triton, "mix_order_reduction"):  # 2.6 % faster without
            inductor.triton.mix_order_reduction = False
    return f"momentum plain: {why}" if why else "momentum plain"
