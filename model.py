"""GPT, HourglassFFN and the YuriiFormer family: one model, chosen by flags.

A pre-norm transformer layer is one step of an optimisation algorithm on the token embeddings X:
attention and the FFN are its two gradient oracles. Three independent choices make a variant:
    template   what a substep does with an oracle's answer    gd, polyak, nesterov, tmm, ...
    splitting  which oracles are asked, and in which order    lie_trotter, euler, strang
    ffn        the second oracle                              mlp, swiglu, hourglass
The plain GPT is template=gd, splitting=lie_trotter, ffn=mlp: it loads nanoGPT's weights and GPT-2's

Sources: YuriiFormer, arXiv 2601.23236; Momentum Streams, arXiv 2605.24425; HourglassFFN, arXiv
2602.06471. "(our reading)" marks what no public source confirms.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from config import check_fields

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's: large CPU tensors in huge pages

Oracle = Callable[[torch.Tensor], torch.Tensor]  # z (B, T, C) -> g(z) (B, T, C)
State = tuple[torch.Tensor, ...]  # x (B, T, C), then whatever streams the template carries


@dataclass
class GPTConfig:
    """The architecture. Raises ValueError that names every bad value, its rule and the fix."""

    block_size: int = 1024  # context length T in tokens
    vocab_size: int = 50304  # rows of the token table (GPT-2's 50257, padded to a multiple of 128)
    vocab_used: int | None = None  # ids the tokenizer has; the rows above are never sampled
    n_layer: int = 12  # layers L
    n_head: int = 12  # attention heads H
    n_embd: int = 768  # residual width d
    dropout: float = 0.0  # probability; drawn anew at each oracle call
    bias: bool = True  # biases in linears and LayerNorms, as GPT-2 has; False is a bit better
    head_dim: int | None = None  # auto: n_embd / n_head; smaller makes hourglass attention
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # every norm (QK-norm is always RMSNorm)
    position: Literal["learned", "rope"] = "learned"  # position table, or rotary embedding
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    qk_norm: bool = False  # RMSNorm of q and k at packed width, before the head split and RoPE
    ffn: Literal["mlp", "swiglu", "hourglass"] = "mlp"  # feed-forward network, the second oracle
    ffn_hidden: int | None = None  # d_ff or d_h; auto: 4 n_embd, hourglass 4/5 n_embd
    ffn_depth: int = 4  # K, the number of sub-MLPs of an hourglass
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # of mlp: nanoGPT's exact, or OpenAI's GPT-2
    ffn_substeps: Literal["joint", "each"] = "joint"  # one substep for the hourglass, or K of them
    template: Literal["gd", "polyak", "nesterov", "tmm", "imex", "symplectic", "rmsprop", "adam",
                      "adamw"] = "gd"  # the update rule; gd is the GPT, nesterov the YuriiFormer
    imex_steps: int = 2  # k of IMEX: attention and FFN are evaluated k times a layer
    splitting: Literal["lie_trotter", "euler", "strang"] = "lie_trotter"  # order of the oracles
    velocity_init: Literal["embed", "zero", "add"] = "embed"  # V_0; add: gd, tables join x
    velocity_norm: Literal["update", "read", "none"] = "update"  # where N_v stands
    mu_init: float = 0.5  # look-ahead at the start (the value, not the raw parameter)
    beta_init: float = 0.5  # velocity decay at the start
    gamma_init: float = math.log(2)  # oracle step size at the start
    scalar_map: Literal["sigmoid", "softplus"] = "sigmoid"  # range of mu and beta: (0, 1), (0, inf)
    residual_init_scale: bool = True  # attention-out and FFN-out start 1/sqrt(2 L) times smaller

    def __post_init__(self) -> None:
        problems = check_fields(self)
        if not problems:
            problems = [f"{what}: {rule}; {fix}" for bad, what, rule, fix in self._rules() if bad]
        if problems:
            raise ValueError("\n".join(problems))

    def _rules(self) -> list[tuple[bool, str, str, str]]:
        """(broken, value, rule, fix) for every rule that a type cannot express."""
        t, s, v = self.template, self.splitting, self.velocity_norm
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "head_dim",
                 "ffn_hidden", "ffn_depth", "imex_steps", "vocab_used")
        most = dict(n_layer=10_000, ffn_depth=10_000, imex_steps=10_000)  # each is a loop
        rules = [((size := getattr(self, name)) is not None and not 1 <= size <= limit,
                  f"{name}={size}", f"must be at least 1, at most {limit}", "choose another")
                 for name in sizes for limit in [most.get(name, 2**31 - 1)]]
        positive = dict(rope_theta=1e30, gamma_init=100, mu_init=100, beta_init=100)
        rules += [(not 0 < getattr(self, name) <= limit, f"{name}={getattr(self, name)}",
                   f"must be positive, and at most {limit:g}",
                   f"the default is {getattr(GPTConfig, name):.4g}")
                  for name, limit in positive.items()]
        rules += [(self.scalar_map == "sigmoid" and value >= 1, f"{name}={value}",
                   "a sigmoid stays below 1", f"use {name} < 1 or scalar_map=softplus")
                  for name, value in (("mu_init", self.mu_init), ("beta_init", self.beta_init))]
        return rules + [
            (not 0 <= self.dropout < 1, f"dropout={self.dropout}", "is a probability below 1",
             "use 0 <= dropout < 1"),
            (self.head_dim is None and self.n_embd > 0 and self.n_embd % max(1, self.n_head) != 0,
             f"n_embd={self.n_embd}, n_head={self.n_head}", "n_embd must be a multiple of n_head",
             "change one, or give head_dim"),
            (self.position == "rope" and self.d_head % 2 == 1,
             f"head_dim={self.d_head}", "position=rope rotates pairs", "use an even head_dim"),
            (bool(self.vocab_used and self.vocab_size) and self.vocab_used > self.vocab_size,
             f"vocab_used={self.vocab_used}", f"vocab_size={self.vocab_size} has fewer rows",
             "raise vocab_size"),
            (s != "lie_trotter" and t not in SPLITTABLE, f"splitting={s}",
             f"template={t} has its own order", "use splitting=lie_trotter"),
            (self.each and t not in SPLITTABLE, "ffn_substeps=each",
             f"template={t} takes the FFN as one oracle", "use ffn_substeps=joint"),
            (self.each and s == "euler", "ffn_substeps=each",
             "splitting=euler has one substep for everything",
             "use splitting=lie_trotter or strang, or ffn_substeps=joint"),
            (self.velocity_init == "add" and t != "gd", "velocity_init=add",
             f"template={t} has a velocity of its own", "use template=gd, or velocity_init=embed"),
            (t == "imex" and v == "read", "velocity_norm=read", "template=imex has no such form",
             "use velocity_norm=update or none"),
            (t == "symplectic" and v != "update", f"velocity_norm={v}",
             "template=symplectic has no such form", "use velocity_norm=update"),
        ]

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.n_embd // max(1, self.n_head) if self.head_dim is None else self.head_dim

    @property
    def d_attn(self) -> int:
        """Packed attention width d_a = n_head * d_head."""
        return self.n_head * self.d_head

    @property
    def d_ffn(self) -> int:
        """Hidden width of the FFN, or of each sub-MLP."""
        default = 4 * self.n_embd // 5 if self.ffn == "hourglass" else 4 * self.n_embd
        return max(1, default) if self.ffn_hidden is None else self.ffn_hidden

    @property
    def each(self) -> bool:
        """Does each sub-MLP of the hourglass get its own substep?"""
        return self.ffn == "hourglass" and self.ffn_substeps == "each"

    @property
    def calls(self) -> tuple[int, int]:
        """How often a layer evaluates (attention, FFN)."""
        k = self.imex_steps if self.template == "imex" else 1
        return (2, 1) if self.splitting == "strang" else (k, k)


# -----------------------------------------------------------------------------
# Parts: linear, norm, rotary positions, key/value cache, attention


@torch.library.custom_op("nanoyurii::matvec", mutates_args=())
def matvec(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (N, C) times x (C,) -> (N,): torch.mv, as an operator that torch.compile leaves whole
    (it would write a slower multiply-and-sum)."""
    return torch.mv(weight, x)


@matvec.register_fake
def _(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(weight.size(0))


class Linear(nn.Linear):
    """nn.Linear that computes in the precision of its weights (see GPT.store_matrices). On a CPU a
    single row, as in decoding, is multiplied as a vector: torch.mv reads the weights up to twice
    as fast as the matrix product does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        x = x.to(self.weight.dtype)
        if x.numel() > self.in_features or not x.is_cpu or torch.is_grad_enabled():
            return super().forward(x)
        whole = torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        y = (matvec if whole else torch.matmul)(self.weight, x.flatten())
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm or RMSNorm over n_embd, eps 1e-5."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def rope_table(positions: torch.Tensor, dim: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """cos and sin of positions (B, T) times theta^(-2i/dim): (2, B, 1, T, dim / 2)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, dim / 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + dim/2) of x (B, H, T, dim) by the angles of `rope`."""
    (cos, sin), (a, b) = rope, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of up to max_length tokens a row, for every attention call of a forward pass.

    The calls come in the same order in every pass, so the n-th call owns the n-th slot, however
    often a template evaluates attention in a layer. The velocity needs no cache: it is carried
    along depth, not along time. No shape ever changes, so that all one-token steps are one
    compiled graph; `lengths` (B,) counts the tokens of each row, which may differ.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.lengths: torch.Tensor | None = None
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.call = 0

    def begin(self, idx: torch.Tensor, block_size: int) -> torch.Tensor:
        """A pass over the next tokens, idx (B, T): their positions (B, T). ValueError where there
        is no room (not when compiled), or if the cache has other rows."""
        if self.lengths is None:
            self.lengths = static(torch.zeros_like(idx[:, 0]))
        if len(self.lengths) != len(idx):
            raise ValueError(f"{len(idx)} rows: the cache has {len(self.lengths)}; make another")
        self.call = 0
        self.positions = self.lengths[:, None] + torch.arange(idx.size(1), device=idx.device)
        if not torch.compiler.is_compiling():
            check_room(self.positions.max() + 1, min(block_size, self.max_length))
        self.rows = torch.arange(idx.size(0), device=idx.device)[:, None]  # (B, 1)
        keys = torch.arange(self.max_length, device=idx.device)
        self.mask = (keys <= self.positions[:, :, None])[:, None]  # (B, 1, T, max_length)
        return self.positions

    def extend(self, k: torch.Tensor, v: torch.Tensor,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store k, v (B, H, T, d_head) of the pass; return all, and the mask of what is seen."""
        if self.call == len(self.slots):
            shape = (k.size(0), self.max_length, k.size(1), k.size(3))
            self.slots.append((static(k.new_zeros(shape)), static(v.new_zeros(shape))))
        keys, values = self.slots[self.call]  # (B, max_length, H, d_head)
        self.call += 1
        keys[self.rows, self.positions] = k.transpose(1, 2)
        values[self.rows, self.positions] = v.transpose(1, 2)
        return keys.transpose(1, 2), values.transpose(1, 2), self.mask

    def end(self) -> None:
        """The pass is complete."""
        self.lengths += self.positions.size(1)
        self.positions, self.rows, self.mask = None, None, None


def check_room(n_tokens: int, room: int) -> None:
    """Raises ValueError where they do not fit."""
    if n_tokens > room:
        raise ValueError(f"{n_tokens} tokens: there is room for {room} (block_size, or the cache's "
                         f"length); crop the input")


def static(x: torch.Tensor) -> torch.Tensor:
    """x, marked as a tensor whose address CUDA graphs may keep."""
    if x.is_cuda:
        torch._dynamo.mark_static_address(x)
    return x


class CausalSelfAttention(nn.Module):
    """Multi-head attention of packed width d_a = n_head * head_dim, which may be below n_embd
    (hourglass attention, arXiv 2602.06471)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.d_attn, bias=config.bias)  # q, k, v
        self.c_proj = Linear(config.d_attn, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.d_attn, eps=1e-5) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.d_attn, eps=1e-5) if config.qk_norm else None

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None = None,
                cache: KVCache | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, d_a) each
        if self.q_norm is not None:
            q = self.q_norm(q.to(self.q_norm.weight.dtype))
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))  # (B, H, T, .)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


# -----------------------------------------------------------------------------
# Parts: feed-forward networks


class MLP(nn.Module):
    """W_proj gelu(W_fc x), as in GPT-2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.gelu = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = Linear(config.d_ffn, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class SwiGLU(nn.Module):
    """W_proj (silu(W_gate x) * W_up x); two separate matrices, so that Muon orthogonalises each."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.c_up = Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.c_proj = Linear(config.d_ffn, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_up(x)))


class HourglassFFN(nn.ModuleList):
    """K narrow SwiGLU sub-MLPs (d -> d_h < d -> d), each with its own pre-norm, on ONE residual
    path (arXiv 2602.06471): z_{i+1} = z_i + m_i(z_i), and z_K is the layer's output.

    As an oracle it answers z_K - z_0, accumulated as the sum of the m_i (our reading).
    """

    def __init__(self, config: GPTConfig):
        super().__init__(
            nn.Sequential(OrderedDict(norm=make_norm(config), ffn=SwiGLU(config)))
            for _ in range(config.ffn_depth))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z_0 (B, T, C) -> z_K - z_0 (B, T, C)."""
        total = torch.zeros_like(z)
        for sub_mlp in self:
            total = total + sub_mlp(z + total)
        return total


FFNS = {"mlp": MLP, "swiglu": SwiGLU, "hourglass": HourglassFFN}


class ChunkedCrossEntropy(torch.autograd.Function):
    """The head and its mean cross-entropy, `chunk` tokens at a time: of the (N, V) logits and their
    gradient only a chunk exists. The gradients need the same logits, so forward computes them too:
    for a token with probabilities p, d loss / d logits = p - onehot(target)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                chunk: int) -> torch.Tensor:
        """x (N, C), weight (V, C), targets (N,), -1 ignored -> ()."""
        dx, dw, total = [], torch.zeros_like(weight), 0.0
        for x_part, target in zip(x.split(chunk), targets[:, None].split(chunk), strict=True):
            logits = F.linear(x_part, weight)  # (chunk, V)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            counts = target != -1
            target = target.where(counts, 0)
            log_p = logits.log_softmax(dim=-1)
            total = total - (log_p.gather(1, target) * counts).sum()
            if any(ctx.needs_input_grad):
                d = log_p.exp().scatter_add(1, target, -torch.ones_like(log_p[:, :1])) * counts
                dx.append(torch.mm(d, weight))
                dw += torch.mm(d.t(), x_part)
        n = (targets != -1).sum()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(torch.cat(dx), dw, n)
        return total / n

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        dx, dw, n = ctx.saved_tensors
        scale = grad / n.clamp(min=1)
        return dx * scale, dw * scale, None, None


# -----------------------------------------------------------------------------
# Templates: what one substep does. It takes an oracle and the state and returns the new state.
# No template knows about attention, no oracle about momentum. To add one: a class, a line in the
# table, its name in GPTConfig.template.


class Template(nn.Module):
    """One substep with its learned scalars, each a parameter of shape (1,), and its norm.

    forward(oracle, state, h) returns the new state: x and as many streams, all (B, T, C); h is the
    step, 1 but for Strang's attention halves. imex and symplectic get (attention, FFN) as oracle.

    streams: how each tensor that travels beside x starts: "embed" (own tables, or zeros with
             velocity_init=zero) or "ones".
    """

    streams: tuple[str, ...] = ()

    def __init__(self, config: GPTConfig, norm: bool = True, **learned: tuple[str, float]):
        """learned: name=(map, value): the map keeps the scalar in its range, sigmoid in (0, 1) and
        softplus in (0, inf); the value is where it starts."""
        super().__init__()
        self.norm = make_norm(config) if norm else None
        self.learned = learned
        for name in learned:
            self.register_parameter(name, nn.Parameter(torch.empty(1)))

    @torch.no_grad()
    def init_scalars(self) -> None:
        """Set the raw parameters to the inverse map of the starting values."""
        for name, (range_map, value) in self.learned.items():
            odds = value / (1 - value) if range_map == "sigmoid" else math.expm1(value)
            getattr(self, name).fill_(math.log(odds))

    def scalar(self, name: str) -> torch.Tensor | None:
        """The mapped value (1,) of a learned scalar; None where this template does not have it."""
        if name not in self.learned:
            return None
        range_map = torch.sigmoid if self.learned[name][0] == "sigmoid" else F.softplus
        return range_map(getattr(self, name))


class GradientDescent(Template):
    """X' = X + h g(X): the residual connection of every GPT."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, norm=False)

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        (x,) = state
        return (torch.add(x, oracle(x), alpha=h),)  # x + h g(x)


class Momentum(Template):
    """Heavy ball, Nesterov and triple momentum (arXiv 2601.23236, 2605.24425):

        Y = X + mu V;   V' = N_v(beta V + gamma h g(Y));   X' = X + h nu V'

    polyak has no look-ahead (mu = 0), polyak and nesterov have nu = 1, tmm learns all four. X moves
    from X, not from Y; the normalised V' overwrites V. Our reading: one N_v and one set of scalars
    per substep, the starting values, h (1/2 in Strang's attention halves), Euler's scalar count.
    velocity_norm=read keeps V raw and moves X by N_v(V'); none has no N_v.
    """

    streams = ("embed",)

    def __init__(self, config: GPTConfig, names: tuple[str, ...]):
        scalars = dict(mu=(config.scalar_map, config.mu_init),
                       beta=(config.scalar_map, config.beta_init),
                       gamma=("softplus", config.gamma_init), nu=("softplus", 1.0))
        super().__init__(config, config.velocity_norm != "none", **{n: scalars[n] for n in names})
        self.velocity_norm = config.velocity_norm

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, v = state
        mu, beta, gamma, nu = map(self.scalar, ("mu", "beta", "gamma", "nu"))
        y = x if mu is None else x + mu * v  # look ahead
        v = beta * v + gamma * h * oracle(y)
        if self.velocity_norm == "update":
            v = self.norm(v)
        step = self.norm(v) if self.velocity_norm == "read" else v
        return torch.add(x, step if nu is None else nu * step, alpha=h), v  # x + h nu step


class Imex(Template):
    """IMEX(k) (our reading of arXiv 2601.23236), both oracles at once, k times:

        Z^0 = X;   V^i = N_v(beta V + gamma_a g_a(Z^{i-1}) + gamma_m g_m(Z^{i-1}));   Z^i = X + V^i

    Every iteration starts from the layer's incoming V. X' = Z^k, V' = V^k.
    """

    streams = ("embed",)

    def __init__(self, config: GPTConfig):
        gamma = ("softplus", config.gamma_init)
        super().__init__(config, config.velocity_norm == "update", gamma_a=gamma, gamma_m=gamma,
                         beta=(config.scalar_map, config.beta_init))
        self.steps = config.imex_steps

    def forward(self, oracles: tuple[Oracle, Oracle], state: State, h: float = 1.0) -> State:
        (x, v), (attention, ffn) = state, oracles
        beta, gamma_a, gamma_m = map(self.scalar, ("beta", "gamma_a", "gamma_m"))
        z = x
        for _ in range(self.steps):
            v_new = beta * v + gamma_a * attention(z) + gamma_m * ffn(z)
            v_new = v_new if self.norm is None else self.norm(v_new)
            z = x + v_new
        return z, v_new


class Symplectic(Template):
    """Hamiltonian, symplectic Euler (our reading of arXiv 2601.23236; eta starts at 1):

        V' = N_v(beta V + gamma g_a(X));   X' = X + eta M(N_m V')

    The FFN, with its pre-norm, is applied to the velocity.
    """

    streams = ("embed",)

    def __init__(self, config: GPTConfig):
        super().__init__(config, beta=(config.scalar_map, config.beta_init),
                         gamma=("softplus", config.gamma_init), eta=("softplus", 1.0))

    def forward(self, oracles: tuple[Oracle, Oracle], state: State, h: float = 1.0) -> State:
        (x, v), (attention, ffn) = state, oracles
        beta, gamma, eta = map(self.scalar, ("beta", "gamma", "eta"))
        v = self.norm(beta * v + gamma * attention(x))
        return x + eta * ffn(v), v


class Preconditioned(Template):
    """RMSProp, Adam and AdamW as templates (arXiv 2605.24425), no look-ahead, no bias correction:

        M' = b1 M + (1 - b1) g(X);   S' = b2 S + (1 - b2) g(X)^2
        X' = (1 - lam) X + gamma N_u(M' / (sqrt S' + 1e-8))

    rmsprop has no M (g stands for it), only adamw decays (lam starts at sigmoid(-5)).
    """

    def __init__(self, config: GPTConfig, names: tuple[str, ...]):
        scalars = dict(beta1=("sigmoid", 0.5), beta2=("sigmoid", 0.5),
                       gamma=("softplus", config.gamma_init),
                       lam=("sigmoid", 1 / (1 + math.exp(5))))
        super().__init__(config, **{n: scalars[n] for n in names})
        self.streams = ("embed", "ones") if "beta1" in names else ("ones",)

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, *m, s = state
        beta1, beta2, gamma, lam = map(self.scalar, ("beta1", "beta2", "gamma", "lam"))
        g = oracle(x).to(x.dtype)
        s = beta2 * s + (1 - beta2) * g.square()
        m = [beta1 * m_ + (1 - beta1) * g for m_ in m]
        update = self.norm((m[0] if m else g) / (s.sqrt() + 1e-8))
        x = x if lam is None else (1 - lam) * x
        return x + gamma * update, *m, s


TEMPLATES: dict[str, Callable[[GPTConfig], Template]] = {
    "gd": GradientDescent,
    "polyak": partial(Momentum, names=("beta", "gamma")),
    "nesterov": partial(Momentum, names=("mu", "beta", "gamma")),
    "tmm": partial(Momentum, names=("mu", "beta", "gamma", "nu")),
    "imex": Imex,
    "symplectic": Symplectic,
    "rmsprop": partial(Preconditioned, names=("beta2", "gamma")),
    "adam": partial(Preconditioned, names=("beta1", "beta2", "gamma")),
    "adamw": partial(Preconditioned, names=("beta1", "beta2", "gamma", "lam")),
}


# -----------------------------------------------------------------------------
# Splittings: which oracles are asked, in which order, with which step. An entry is (oracle, h).


def lie_trotter(attention: Oracle, ffns: list[Oracle]) -> list[tuple[Oracle, float]]:
    """Attention, then the FFN (or its sub-MLPs one after the other)."""
    return [(attention, 1.0), *((ffn, 1.0) for ffn in ffns)]


def euler(attention: Oracle, ffns: list[Oracle]) -> list[tuple[Oracle, float]]:
    """One substep of the sum: the parallel block."""
    (ffn,) = ffns
    return [(lambda z: attention(z).to(z.dtype) + ffn(z), 1.0)]


def strang(attention: Oracle, ffns: list[Oracle]) -> list[tuple[Oracle, float]]:
    """Half attention, FFN, half attention with the same weights (our reading of PRK-Verlet)."""
    return [(attention, 0.5), *((ffn, 1.0) for ffn in ffns), (attention, 0.5)]


def own_order(attention: Oracle, ffns: list[Oracle]) -> list[tuple[tuple[Oracle, Oracle], float]]:
    """The template gets both oracles and orders them itself."""
    (ffn,) = ffns
    return [((attention, ffn), 1.0)]


SPLITTINGS = {"lie_trotter": lie_trotter, "euler": euler, "strang": strang}
SPLITTABLE = ("gd", "polyak", "nesterov", "tmm")  # the templates that take every splitting
OWN_ORDER = ("imex", "symplectic")


# -----------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """One layer: two oracles, and the substeps that ask them. Names are nanoGPT's."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.Identity() if config.ffn == "hourglass" else make_norm(config)
        self.mlp = FFNS[config.ffn](config)  # an hourglass brings the norms of its sub-MLPs
        self.each = config.each
        self.split = own_order if config.template in OWN_ORDER else SPLITTINGS[config.splitting]
        n_substeps = len(self.split(*self.oracles()))
        self.steps = nn.ModuleList(TEMPLATES[config.template](config) for _ in range(n_substeps))

    def oracles(self, rope: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Oracle, list[Oracle]]:
        """Attention, and the FFN as one oracle or as its K sub-MLPs."""
        ffns = list(self.mlp) if self.each else [lambda z: self.mlp(self.ln_2(z))]
        return lambda z: self.attn(self.ln_1(z), rope, cache), ffns

    def forward(self, state: State, rope: torch.Tensor | None = None,
                cache: KVCache | None = None) -> State:
        """state: x (B, T, C) and the template's streams of the same shape."""
        substeps = self.split(*self.oracles(rope, cache))
        for step, (oracle, h) in zip(self.steps, substeps, strict=True):
            state = step(oracle, state, h)
        return state


class GPT(nn.Module):
    """The language model: embeddings, L blocks, final norm, tied head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        c = config
        h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.streams = h[0].steps[0].streams
        own = "embed" in self.streams and c.velocity_init == "embed"
        tables = own or c.velocity_init == "add"
        learned = c.position == "learned"
        parts = dict(wte=nn.Embedding(c.vocab_size, c.n_embd),
                     wpe=nn.Embedding(c.block_size, c.n_embd) if learned else None,
                     vte=nn.Embedding(c.vocab_size, c.n_embd) if tables else None,
                     vpe=nn.Embedding(c.block_size, c.n_embd) if tables and learned else None,
                     drop=nn.Dropout(c.dropout), h=h, ln_f=make_norm(c))
        self.transformer = nn.ModuleDict({k: m for k, m in parts.items() if m is not None})
        self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.activation_checkpointing = False  # True: the backward pass computes each block again
        self.loss_chunk: int | None = None  # head and loss for so many tokens at a time
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02) for every matrix and table, smaller by 1/sqrt(2 L) for what writes to the
        residual stream (residual_init_scale); biases 0, gains 1, scalars as configured."""
        out_scale = (2 * self.config.n_layer) ** -0.5 if self.config.residual_init_scale else 1.0
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02 * (out_scale if name.endswith("c_proj") else 1.0)
                nn.init.normal_(module.weight, 0.0, std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, Template):
                module.init_scalars()

    def embed(self, idx: torch.Tensor, positions: torch.Tensor | None = None) -> State:
        """Tokens (B, T) at positions (B, T), or 0..T-1 -> x and the streams, each (B, T, C)."""
        t = self.transformer
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)[None]  # (1, T)

        def look_up(tokens: str, places: str) -> torch.Tensor:
            e = t[tokens](idx)
            return t.drop(e + t[places](positions) if places in t else e)  # (B, T, C)

        x = look_up("wte", "wpe")
        if self.config.velocity_init == "add":
            x = x + look_up("vte", "vpe")  # the control "tables without dynamics"
        starts = {"ones": lambda: torch.ones_like(x),
                  "embed": lambda: look_up("vte", "vpe") if "vte" in t else torch.zeros_like(x)}
        return x, *(starts[kind]() for kind in self.streams)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx (B, T) token ids -> what the head reads (B, T, C). With a cache, idx continues the
        cached tokens. Raises ValueError where all tokens exceed block_size or the cache."""
        c = self.config
        if cache is None:
            check_room(idx.size(1), c.block_size)
            positions = torch.arange(idx.size(1), device=idx.device)[None]  # (1, T)
        else:
            positions = cache.begin(idx, c.block_size)  # (B, T)
        state = self.embed(idx, positions)
        rope = None
        if c.position == "rope":
            wide = torch.promote_types(self.lm_head.weight.dtype, torch.float32)  # angles need it
            rope = rope_table(positions, c.d_head, c.rope_theta, wide)
        for block in self.transformer.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                state = recompute(block, state, rope, use_reentrant=False)
            else:
                state = block(state, rope, cache)
        if cache is not None:
            cache.end()
        return self.transformer.ln_f(state[0])

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None, reduction: Literal["mean", "none"] = "mean",
                last: torch.Tensor | None = None,
                ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """idx (B, T) token ids, with a cache as in `hidden` -> (logits, loss).

        With targets (B, T), logits (B, T, vocab_size) and the cross-entropy in nats per token, at
        least fp32, target -1 ignored: its mean (), or (B, T) with reduction="none". Without,
        logits (B, 1, vocab_size) of the last position, or of position last (B,) of each row, and
        None. With loss_chunk, the mean comes without logits.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            x = x[:, -1:] if last is None else x[torch.arange(len(x), device=x.device), last, None]
            return self.lm_head(x), None
        if self.loss_chunk and reduction == "mean":
            return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight,
                                                   targets.flatten(), self.loss_chunk)
        logits = self.lm_head(x)  # (B, T, V)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction=reduction)
        return logits, loss if reduction == "mean" else loss.view_as(targets)

    # --- generation ---

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None,
               stop_tokens: tuple[int, ...] = (), generator: torch.Generator | None = None,
               lengths: torch.Tensor | None = None, cache: KVCache | None = None,
               compile: bool = False) -> Iterator[torch.Tensor]:
        """Continue idx (B, T >= 1), or of every row its first lengths (B,) >= 1 tokens: yield the
        next token of every row, (B,), up to max_new_tokens times, ending early when every row has
        met a stop token (such a row repeats it).

        temperature 0 (or below 1e-6) is greedy; top_k keeps the k likeliest tokens, top_p the
        fewest whose probability reaches p. Rows beyond vocab_used are never drawn. When a row's
        context is full its older half is dropped and the rest read again (a sliding window of T/2
        to T). compile: the one-token step, with CUDA graphs where there is CUDA. cache: one to use
        anew, for which nothing need be compiled again.
        """
        c, idx = self.config, idx.long()
        stops = torch.tensor(stop_tokens, dtype=idx.dtype, device=idx.device)
        token = torch.zeros_like(idx[:, 0])
        stopped = torch.zeros_like(token, dtype=torch.bool)
        room = min(c.block_size, idx.size(1) + max_new_tokens - 1)
        cache = cache or KVCache(room)
        check_room(room, cache.max_length)
        mode = "reduce-overhead" if idx.is_cuda else None
        step = torch.compile(self, fullgraph=True, dynamic=False, mode=mode) if compile else self
        # Each row's window of at most `room` tokens, left-aligned, `count` (B,) of them so far
        window, count = idx, torch.full_like(token, idx.size(1)) if lengths is None else lengths
        if not (1 <= count.min() and count.max() <= idx.size(1)):
            raise ValueError(f"lengths={count.tolist()}: must lie in 1..{idx.size(1)}")
        longest, keep = None, room  # of the counts
        for _ in range(max_new_tokens):
            if longest is None or longest > room:  # read all
                kept = count.where(count <= room, keep)
                places = (count - kept)[:, None] + torch.arange(room + 1, device=idx.device)
                window = window.gather(1, places.clamp(max=window.size(1) - 1))
                count, longest, keep = kept, int(kept.max()), max(1, c.block_size // 2)
                cache.lengths = None if cache.lengths is None else cache.lengths.zero_()
                logits, _ = self(window[:, :longest], cache=cache, last=count - 1)
                cache.lengths.copy_(count)
            else:
                if compile:  # else it would import torch's compiler, which takes seconds
                    torch.compiler.cudagraph_mark_step_begin()
                logits, _ = step(token[:, None], cache=cache)
            logits = logits[:, -1].float()  # (B, V)
            logits[:, c.vocab_used or c.vocab_size:] = -torch.inf
            drawn = draw(logits, temperature, top_k, top_p, generator)
            token = torch.where(stopped, token, drawn)
            stopped = stopped | torch.isin(token, stops)
            window = window.scatter(1, count[:, None], token[:, None])
            count, longest = count + 1, longest + 1
            yield token
            if stop_tokens and stopped.all():
                return

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, **more) -> torch.Tensor:
        """idx (B, T) -> (B, T + new): idx and what `stream` yields; `more` are its arguments."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, **more)
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)

    def store_matrices(self, dtype: torch.dtype) -> None:
        """For inference without autocast: convert the linears once, as autocast would at every
        call, for the same numbers. The head becomes a copy of the token table, which stays."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for name, p in list(module.named_parameters()):
                    setattr(module, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))

    # --- accounting ---

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, the tied head once; non_embedding leaves out the positions and the velocity
        tables (inputs only), and keeps the token table, which is the head's matrix."""
        inputs_only = (m for k, m in self.transformer.items() if k in ("wpe", "vte", "vpe"))
        n = sum(p.numel() for p in self.parameters())
        return n - sum(m.weight.numel() for m in inputs_only) if non_embedding else n

    def flops_per_token(self) -> int:
        """Training FLOPs per token, 3 x forward: 2 per weight of a matrix and evaluation, attention
        2 T d_a per layer (causal average) and evaluation, the head 2 V d."""
        c, block = self.config, self.transformer.h[0]
        attn_calls, ffn_calls = c.calls
        attn, ffn = (sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))
                     for part in (block.attn, block.mlp))
        layer = 2 * (attn_calls * (attn + c.block_size * c.d_attn) + ffn_calls * ffn)
        return 3 * (c.n_layer * layer + 2 * c.vocab_size * c.n_embd)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak: float = 312e12) -> float:
        """Model FLOPs utilisation: fwdbwd_per_iter sequences per device in dt seconds, as a share
        of the device's `peak` FLOP/s (default: an A100 in bf16)."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def parameter_roles(self) -> dict[str, dict[str, nn.Parameter]]:
        """matrix (2-D, in the blocks), embedding (all tables, the tied head), norm (gains and
        biases), scalar (the templates'): name -> parameter, every parameter in exactly one."""
        roles: dict = {"matrix": {}, "embedding": {}, "norm": {}, "scalar": {}}
        for path, module in self.named_modules():
            for name, p in module.named_parameters(recurse=False):
                if isinstance(module, nn.Embedding):
                    role = "embedding"
                elif isinstance(module, Template):
                    role = "scalar"
                else:
                    role = "matrix" if isinstance(module, nn.Linear) and p.ndim == 2 else "norm"
                if module is not self.lm_head:
                    roles[role][f"{path}.{name}"] = p
        named = dict(self.named_parameters())
        assert sum(map(len, roles.values())) == len(named), "a parameter is in no role, or in two"
        return roles

    def configure_optimizers(self, weight_decay: float, learning_rate: float,
                             betas: tuple[float, float], device_type: str,
                             scalar_lr: float | None = None,
                             roles: tuple[str, ...] = ("matrix", "embedding", "norm", "scalar"),
                             ) -> torch.optim.AdamW:
        """AdamW over the parameters of `roles`: matrices and tables decay, norms, biases and
        scalars do not; scalars at scalar_lr (default: learning_rate)."""
        groups = [dict(params=list(params.items()), role=role,
                       lr=learning_rate if role != "scalar" or scalar_lr is None else scalar_lr,
                       weight_decay=weight_decay if role in ("matrix", "embedding") else 0.0)
                  for role, params in self.parameter_roles().items() if role in roles and params]
        return torch.optim.AdamW(groups, betas=betas, fused=device_type in ("cuda", "cpu", "mps"))

    @torch.no_grad()
    def learned_scalars(self) -> dict[str, list[list[float]]]:
        """The templates' scalars, mapped: name -> for each layer the values of its substeps."""
        steps = [list(block.steps) for block in self.transformer.h]
        names = list(steps[0][0].learned)
        if not names:
            return {}
        values = torch.stack([torch.stack([torch.cat([step.scalar(name) for step in layer])
                                           for layer in steps]) for name in names])  # one read
        return dict(zip(names, values.tolist(), strict=True))

    @torch.no_grad()
    def residual_path(self, idx: torch.Tensor) -> tuple[list[float], list[float]]:
        """The way of x through depth for tokens idx (B, T), means over tokens: the L lengths
        |x_{l+1} - x_l|, and the L - 1 angles between a layer's step and the next, in degrees."""
        xs: list[torch.Tensor] = []
        hooks = [block.register_forward_hook(
            lambda _, inputs, state: xs.extend([inputs[0][0], state[0]] if not xs else [state[0]]))
            for block in self.transformer.h]
        try:
            self(idx)
        finally:
            for hook in hooks:
                hook.remove()
        steps = torch.stack(xs).double().diff(dim=0)  # (L, B, T, C)
        cosines = F.cosine_similarity(steps[1:], steps[:-1], dim=-1).clamp(-1, 1)
        angles = cosines.arccos().rad2deg().mean(dim=(1, 2))
        return steps.norm(dim=-1).mean(dim=(1, 2)).tolist(), angles.tolist()

    # --- weights from elsewhere ---

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context; cuts the position tables. Raises ValueError if it would grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: must lie in 1..{self.config.block_size}, "
                             f"the model's own; choose a smaller one")
        self.config = replace(self.config, block_size=block_size)
        for name in ("wpe", "vpe"):
            if name in self.transformer:
                table = self.transformer[name]
                table.weight = nn.Parameter(table.weight[:block_size].detach().clone())
                table.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> "GPT":
        """OpenAI's GPT-2 through transformers: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
        that transformers saved. override_args: only dropout. Raises ValueError for another
        architecture, and what transformers raises where it cannot load."""
        from transformers import GPT2LMHeadModel

        override_args = override_args or {}
        if set(override_args) - {"dropout"}:
            raise ValueError(f"{sorted(override_args)}: only dropout can be overridden")
        source, info = GPT2LMHeadModel.from_pretrained(model_type, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it has no {sorted(info['missing_keys'])[0]}")
        hf = source.config
        gelus = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
        needed = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, tie_word_embeddings=True,
                      scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        other = [f"{name}={getattr(hf, name)}" for name, value in needed.items()
                 if getattr(hf, name) != value]
        if hf.activation_function not in gelus:
            other.append(f"activation_function={hf.activation_function}")
        if other:
            raise ValueError(f"it is no GPT-2 that this model can be: it has {', '.join(other)}")
        model = cls(GPTConfig(
            block_size=hf.n_positions, vocab_size=hf.vocab_size, n_layer=hf.n_layer,
            n_head=hf.n_head, n_embd=hf.n_embd, ffn_hidden=hf.n_inner, bias=True,
            activation=gelus[hf.activation_function], **override_args))
        model.load_state_dict(transposed(source.state_dict()))
        return model


def transposed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights as transformers' GPT-2 has them, or back: its matrices are transposed."""
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.t() if name.endswith(ends) else w for name, w in weights.items()}


# -----------------------------------------------------------------------------
# Running a model: drawing tokens, reading checkpoints, device and precision


def draw(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
         top_p: float | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token id per row of logits (B, V) -> (B,). See GPT.stream."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    ids, n = None, logits.size(-1)
    if (top_k or n) < n or top_p is not None:  # ranked, the likeliest first
        logits, ids = logits.topk(min(top_k or n, n))
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # the probability of the likelier tokens
        probs = probs.masked_fill((before >= top_p) & (before > 0), 0.0)
    drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


