"""GPT, HourglassFFN and the YuriiFormer family: one model, chosen by flags.

A pre-norm transformer layer is one step of an optimisation algorithm on the token embeddings X:
attention and the FFN are its two gradient oracles. A few choices make a variant:
    template   what a substep does with an oracle's answer    gd, polyak, nesterov, tmm, ...
    splitting  which oracles are asked, and in which order    lie_trotter, euler, strang
    attention  the first oracle                               causal
    ffn        the second oracle                              mlp, swiglu, hourglass
The plain GPT is template=gd, splitting=lie_trotter, ffn=mlp: it loads the weights of nanoGPT and of
OpenAI's GPT-2.

To add your own: a class and a line in TEMPLATES, FFNS or ATTENTIONS. This file imports torch alone
(and transformers, to read GPT-2's weights).

Sources: YuriiFormer, arXiv 2601.23236; Momentum Streams, arXiv 2605.24425; HourglassFFN, arXiv
2602.06471. "(our reading)" marks what no public source confirms.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

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
    norm_place: Literal["pre", "post"] = "pre"  # before an oracle, or after it as OLMo 2: N(g(X))
    position: Literal["learned", "rope"] = "learned"  # position table, or rotary embedding
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    qk_norm: bool = False  # RMSNorm of q and k at packed width, before the head split and RoPE
    attention: str = "causal"  # the first oracle
    ffn: str = "mlp"  # feed-forward network, the second oracle
    ffn_hidden: int | None = None  # d_ff or d_h; auto: 4 n_embd, hourglass 4/5 n_embd
    ffn_depth: int = 4  # K, the number of sub-MLPs of an hourglass
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # mlp's: nanoGPT's, OpenAI's GPT-2's
    ffn_substeps: Literal["joint", "each"] = "joint"  # one substep for the hourglass, or K of them
    template: str = "gd"  # the update rule; gd is the GPT, nesterov the YuriiFormer
    imex_steps: int = 2  # k of IMEX: attention and FFN are evaluated k times a layer
    splitting: str = "lie_trotter"  # order of the oracles
    velocity_init: Literal["embed", "zero", "add"] = "embed"  # start of V; add (gd): x + 2nd table
    velocity_norm: Literal["update", "read", "none"] = "update"  # what the velocity norm N_v wraps
    mu_init: float = 0.5  # look-ahead at the start (the value, not the raw parameter)
    beta_init: float = 0.5  # velocity decay at the start
    gamma_init: float = math.log(2)  # oracle step size at the start (gain and x0 start at 1)
    scalar_map: Literal["sigmoid", "softplus"] = "sigmoid"  # range of mu and beta: (0, 1), (0, inf)
    stream_dtype: Literal["float32", "bfloat16"] = "float32"  # of x and the streams beside it
    residual_init_scale: bool = True  # attention-out and FFN-out start 1/sqrt(2 L) times smaller
    embed_scale: float = 1.0  # factor of the embeddings that x starts as; the tables stay

    def __post_init__(self) -> None:
        broken: list[str] = []
        self.rules(lambda holds, otherwise: holds or broken.append(otherwise))
        if broken:
            raise ValueError("\n".join(broken))

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        """rule(what must hold, what to say where it does not)."""
        for name in ("block_size", "vocab_size", "vocab_used", "n_layer", "n_head", "n_embd",
                     "head_dim", "ffn_hidden", "ffn_depth", "imex_steps"):
            size = getattr(self, name)
            most = 10_000 if name in ("n_layer", "ffn_depth", "imex_steps") else 2**31 - 1
            rule(size is None or 1 <= size <= most,
                 f"{name}={size}: must be at least 1, at most {most}; choose another")
        for name in ("rope_theta", "gamma_init", "mu_init", "beta_init", "embed_scale"):
            value = getattr(self, name)
            limit = 1 if name in ("mu_init", "beta_init") and self.scalar_map == "sigmoid" else 1e30
            rule(0 < value < limit, f"{name}={value}: must be positive, and below {limit:g}"
                                    f"{'; or use scalar_map=softplus' if limit == 1 else ''}")
        rule(0 <= self.dropout < 1,
             f"dropout={self.dropout}: is a probability below 1; use 0 <= dropout < 1")
        rule(self.head_dim is not None or self.n_head < 1 or self.n_embd % self.n_head == 0,
             f"n_embd={self.n_embd}, n_head={self.n_head}: n_embd must be a multiple of n_head; "
             f"change one, or give head_dim")
        rule(self.position != "rope" or self.d_head % 2 == 0,
             f"head_dim={self.d_head}: position=rope rotates pairs; use an even head_dim")
        rule(self.vocab_used is None or self.vocab_used <= (self.vocab_size or math.inf),
             f"vocab_used={self.vocab_used}: vocab_size={self.vocab_size} has fewer rows; raise "
             f"vocab_size")

        names = {name: get_args(kind) for name, kind in get_type_hints(GPTConfig).items()
                 if get_origin(kind) is Literal} | self.choices()
        for name, known in names.items():
            rule(getattr(self, name) in known,
                 f"{name}={getattr(self, name)}: expected {' | '.join(map(str, known))}")
        template = TEMPLATES.get(self.template, Template)
        splittings = template.splittings or ("lie_trotter",)
        rule(self.splitting in splittings or self.splitting not in SPLITTINGS,
             f"splitting={self.splitting}: template={self.template} does not take it; use "
             f"splitting={' or '.join(splittings)}")
        rule(not self.each or (len(template.splittings) > 1 and self.splitting != "euler"),
             f"ffn_substeps=each: template={self.template} with splitting={self.splitting} takes "
             f"the FFN as one oracle; use ffn_substeps=joint")
        rule(self.norm_place != "post" or not self.hourglass,
             f"norm_place=post: ffn={self.ffn} brings its sub-MLPs' own pre-norms; use "
             "norm_place=pre, or ffn=swiglu")
        rule(self.velocity_init != "add" or not template.streams,
             f"velocity_init=add: template={self.template} has a stream of its own; use "
             f"template=gd, or velocity_init=embed")
        rule(self.velocity_norm in template.velocity_norms or not template.velocity_norms,
             f"velocity_norm={self.velocity_norm}: template={self.template} has no such form; use "
             f"velocity_norm={' or '.join(template.velocity_norms)}")

    @staticmethod
    def choices() -> dict[str, Iterable[str]]:
        """The options that name an entry of a table, to which a fork may add."""
        return {"attention": ATTENTIONS, "ffn": FFNS, "template": TEMPLATES,
                "splitting": SPLITTINGS}

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
        default = 4 * self.n_embd // 5 if self.hourglass else 4 * self.n_embd
        return max(1, default) if self.ffn_hidden is None else self.ffn_hidden

    @property
    def hourglass(self) -> bool:
        """Is the FFN one, or of a class derived from it?"""
        ffn = FFNS.get(self.ffn)
        return isinstance(ffn, type) and issubclass(ffn, HourglassFFN)

    @property
    def each(self) -> bool:
        """Does each sub-MLP of the hourglass get its own substep?"""
        return self.hourglass and self.ffn_substeps == "each"


# -----------------------------------------------------------------------------
# Parts: norm, rotary positions, key/value cache, attention


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm or RMSNorm over n_embd, eps 1e-5."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


class OutputProjection(nn.Linear):
    """The last matrix of an oracle, a fork's too: with residual_init_scale it starts smaller."""


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + dim/2) of x (B, H, T, dim) by the angles of GPT.rope."""
    (cos, sin), (a, b) = rope, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far, for every attention call of a forward pass: of up to
    max_length tokens, or of the model's block_size.

    The calls come in the same order in every pass, so the n-th call owns the n-th slot, however
    often a template evaluates attention in a layer. The velocity needs no cache: it is carried
    along depth, not along time. (sample.py has one of fixed shape, which compiles.)
    """

    def __init__(self, max_length: int | None = None):
        self.length, self.max_length = 0, max_length
        self.slots: list[list[torch.Tensor]] = []  # keys and values, (B, H, max_length, d_head)

    def begin(self, idx: torch.Tensor, block_size: int) -> torch.Tensor:
        """A pass over the next tokens, idx (B, T): their positions (1, T). ValueError where all
        tokens together exceed block_size."""
        start, end = self.length, self.length + idx.size(1)
        self.max_length = min(self.max_length or block_size, block_size)
        if end > self.max_length:
            raise ValueError(f"{end} tokens: there is room for {self.max_length}; crop the input")
        self.call, self.length = 0, end
        return torch.arange(start, end, device=idx.device)[None]

    def extend(self, k: torch.Tensor, v: torch.Tensor,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store k, v (B, H, T, d_head) of the pass; return those of all S tokens (H may be fewer
        heads than q's), and the mask of what is seen, (T, S) or (B, 1, T, S). None: each token sees
        itself and all before it, and T is 1 or S, so is_causal=T > 1. (With a mask, S may count
        places still empty: the mask says where a token stands, the shape does not.)"""
        T, S = k.size(2), self.length
        if self.call == len(self.slots):
            self.slots.append([z.new_empty(z.size(0), z.size(1), self.max_length, z.size(3))
                               for z in (k, v)])
        keys, values = (slot[:, :, :S] for slot in self.slots[self.call])
        keys[:, :, S - T:], values[:, :, S - T:] = k, v
        self.call += 1
        if T in (1, S):
            return keys, values, None
        return keys, values, torch.ones(T, S, dtype=torch.bool, device=k.device).tril(S - T)

    def end(self) -> None:
        """The pass is complete."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention of packed width d_a = n_head * head_dim, which may be below n_embd
    (hourglass attention, arXiv 2602.06471)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.d_attn, bias=config.bias)  # q, k, v
        self.c_proj = OutputProjection(config.d_attn, config.n_embd, bias=config.bias)
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
        causal = mask is None and bool(T > 1)  # no mask: faster kernels; bool, for torch.export
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


ATTENTIONS = {"causal": CausalSelfAttention}


# -----------------------------------------------------------------------------
# Parts: feed-forward networks


class MLP(nn.Module):
    """W_proj gelu(W_fc x), as in GPT-2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.gelu = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = OutputProjection(config.d_ffn, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class SwiGLU(nn.Module):
    """W_proj (silu(W_gate x) * W_up x); two separate matrices, so that Muon orthogonalises each."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.c_up = nn.Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.c_proj = OutputProjection(config.d_ffn, config.n_embd, bias=config.bias)
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


# -----------------------------------------------------------------------------
# Templates: what one substep does. It takes an oracle and the state and returns the new state.
# No template knows about attention, no oracle about momentum. (imex and symplectic get both oracles
# and their order; the others one oracle at a time.)


RANGES: dict[str, tuple[Callable, Callable]] = {  # of a scalar: raw -> value, value -> raw
    "identity": (lambda raw: raw, lambda value: value),
    "sigmoid": (torch.sigmoid, torch.logit),  # (0, 1)
    "softplus": (F.softplus, lambda value: value + (-(-value).expm1()).log())}  # (0, inf)


class Template(nn.Module):
    """One substep with its learned scalars and its norm.

    forward(oracle, state, h) returns the new state: x and as many streams, all (B, T, C); h is the
    step, 1 but for Strang's attention halves. All parameters are scalars to the optimiser, unless a
    module in it has another `role`; norms stay norms. Only `learn` makes bare parameters.

    streams:        how each tensor that travels beside x starts: as "x", "embed" (a second table,
                    or zeros with velocity_init=zero), "zeros" or "ones"
    scalars:        those of the family that it learns (see __init__); `learn` adds others
    starts:         the values of those that start otherwise than the options say
    splittings:     those that it takes; (): its oracle is (attention, FFN), and the order its own
    velocity_norms: the values of velocity_norm that it has; (): none, and self.norm does nothing
    oracle_calls:   how often forward asks an oracle that it is given
    """

    streams: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    starts: dict[str, float] = {}
    splittings: tuple[str, ...] = ("lie_trotter", "euler", "strang")
    velocity_norms: tuple[str, ...] = ("update",)
    oracle_calls = 1
    role = "scalar"

    def __init__(self, config: GPTConfig, layer: int, index: int):
        """The substep number `index` of a layer; both count from 0."""
        super().__init__()
        self.learned: dict[str, str] = {}  # name -> its range
        starts = dict(mu=config.mu_init, beta=config.beta_init, gamma=config.gamma_init,
                      gamma_a=config.gamma_init, gamma_m=config.gamma_init, nu=1.0, eta=1.0,
                      beta1=0.5, beta2=0.5, lam=1 / (1 + math.exp(5)), alpha=0.0) | self.starts
        ranges = dict(mu=config.scalar_map, beta=config.scalar_map, beta1="sigmoid",
                      beta2="sigmoid", lam="sigmoid", alpha="identity")
        for name in self.scalars:
            self.learn(name, starts[name], ranges.get(name, "softplus"))
        self.velocity_norm = config.velocity_norm if self.velocity_norms else "none"
        self.norm = nn.Identity() if self.velocity_norm == "none" else make_norm(config)

    def learn(self, name: str, start: float, range_map: str, shape: tuple[int, ...] = (1,)) -> None:
        """Add a learned scalar, or a tensor of any shape that broadcasts to (B, T, C). Its value,
        at first `start`, lies in a range of RANGES. (With the shape () it would not lift a bf16
        answer of an oracle to fp32.)"""
        _, raw_of = RANGES[range_map]
        raw = raw_of(torch.full(shape, start, dtype=torch.float64))
        self.register_parameter(name, nn.Parameter(raw.to(torch.get_default_dtype())))
        self.learned[name] = range_map

    def scalar(self, name: str) -> torch.Tensor | None:
        """The mapped value of a learned scalar; None where this template does not have it."""
        if name not in self.learned:
            return None
        value_of, _ = RANGES[self.learned[name]]
        return value_of(getattr(self, name))


class GradientDescent(Template):
    """X' = X + h g(X): the residual connection of every GPT."""

    velocity_norms = ()

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        (x,) = state
        g = oracle(x)
        return (x + (g if h == 1 else h * g),)


class Momentum(Template):
    """Heavy ball, Nesterov and triple momentum (arXiv 2601.23236, 2605.24425):

        Y = X + mu V;   V' = N_v(beta V + gamma h g(Y));   X' = X + h nu V'

    polyak has no look-ahead (mu = 0), polyak and nesterov have nu = 1, tmm learns all four. X moves
    from X, not from Y; the normalised V' overwrites V. Our reading: one N_v and one set of scalars
    per substep, the starting values, h (1/2 in Strang's attention halves), Euler's scalar count.
    velocity_norm=read keeps V raw and moves X by N_v(V'); none has no N_v.
    """

    streams = ("embed",)
    scalars = ("mu", "beta", "gamma", "nu")
    velocity_norms = ("update", "read", "none")

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, v = state
        mu, beta, gamma, nu = map(self.scalar, ("mu", "beta", "gamma", "nu"))
        y = x if mu is None else x + mu * v  # look ahead
        v = beta * v + gamma * h * oracle(y)
        step = self.norm(v)
        v = v if self.velocity_norm == "read" else step
        step = step if nu is None else nu * step
        return x + (step if h == 1 else h * step), v


class HeavyBall(Momentum):
    scalars = ("beta", "gamma")


class Nesterov(Momentum):
    scalars = ("mu", "beta", "gamma")


class Imex(Template):
    """IMEX(k) (our reading of arXiv 2601.23236), both oracles at once, k times:

        Z^0 = X;   V^i = N_v(beta V + gamma_a g_a(Z^{i-1}) + gamma_m g_m(Z^{i-1}));   Z^i = X + V^i

    Every iteration starts from the layer's incoming V. X' = Z^k, V' = V^k.
    """

    streams = ("embed",)
    scalars = ("gamma_a", "gamma_m", "beta")
    splittings = ()
    velocity_norms = ("update", "none")

    def __init__(self, config: GPTConfig, layer: int, index: int):
        super().__init__(config, layer, index)
        self.oracle_calls = config.imex_steps

    def forward(self, oracles: tuple[Oracle, Oracle], state: State, h: float = 1.0) -> State:
        (x, v), (attention, ffn) = state, oracles
        beta, gamma_a, gamma_m = map(self.scalar, ("beta", "gamma_a", "gamma_m"))
        z = x
        for _ in range(self.oracle_calls):
            v_new = self.norm(beta * v + gamma_a * attention(z) + gamma_m * ffn(z))
            z = x + v_new
        return z, v_new


class Symplectic(Template):
    """Hamiltonian, symplectic Euler (our reading of arXiv 2601.23236; eta starts at 1):

        V' = N_v(beta V + gamma g_a(X));   X' = X + eta M(N_m V')

    The FFN, with its pre-norm, is applied to the velocity.
    """

    streams = ("embed",)
    scalars = ("beta", "gamma", "eta")
    splittings = ()

    def forward(self, oracles: tuple[Oracle, Oracle], state: State, h: float = 1.0) -> State:
        (x, v), (attention, ffn) = state, oracles
        beta, gamma, eta = map(self.scalar, ("beta", "gamma", "eta"))
        v = self.norm(beta * v + gamma * attention(x))
        return x + eta * ffn(v), v


class AdamW(Template):
    """RMSProp, Adam and AdamW as templates (arXiv 2605.24425), no look-ahead, no bias correction:

        M' = b1 M + (1 - b1) g(X);   S' = b2 S + (1 - b2) g(X)^2
        X' = (1 - lam) X + gamma N_u(M' / (sqrt S' + 1e-8))

    rmsprop has no M (g stands for it), only adamw decays (lam starts at sigmoid(-5)).
    """

    streams = ("embed", "ones")
    scalars = ("beta1", "beta2", "gamma", "lam")
    splittings = ("lie_trotter",)

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, *m, s = state
        beta1, beta2, gamma, lam = map(self.scalar, ("beta1", "beta2", "gamma", "lam"))
        g = oracle(x).to(beta2.dtype)
        s = beta2 * s + (1 - beta2) * g.square()
        m = [beta1 * m_ + (1 - beta1) * g for m_ in m]
        update = self.norm((m[0] if m else g) / (s.sqrt() + 1e-8))
        x = x if lam is None else (1 - lam) * x
        return x + gamma * update, *m, s


class Adam(AdamW):
    scalars = ("beta1", "beta2", "gamma")


class RMSProp(AdamW):
    streams = ("ones",)
    scalars = ("beta2", "gamma")


# The controls: what a velocity brings along, without the velocity


class Gain(GradientDescent):
    """X' = X + h gamma g(X): a learned step size alone, near ReZero (arXiv 2003.04887), which
    starts it at 0, and LayerScale (2103.17239), which has one for each channel."""

    scalars = ("gamma",)
    starts = {"gamma": 1.0}

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        (x,) = state
        return (x + self.scalar("gamma") * h * oracle(x),)


class Normed(Template):
    """X' = X + h N_v(gamma h g(X)): the norm alone, which is the sandwich norm of CogView (arXiv
    2105.13290), as N_v(gamma g) and N_v(g) are one function but for eps."""

    scalars = ("gamma",)

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        (x,) = state
        return (x + h * self.norm(self.scalar("gamma") * h * oracle(x)),)


class Frozen(Template):
    """X' = X + h N_v(beta V_0 + gamma h g(X)): polyak whose V_0 is never updated: norm and table,
    but no momentum. (No paper has this control.)"""

    streams = ("embed",)
    scalars = ("beta", "gamma")

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, v0 = state
        step = self.norm(self.scalar("beta") * v0 + self.scalar("gamma") * h * oracle(x))
        return x + h * step, v0


class Skip(GradientDescent):
    """X' = X + h (g(X) + alpha V_0): the table alone, a second stream without dynamics; the nearest
    kin of two-lane hyper-connections (arXiv 2409.19606). alpha starts at 0, any sign."""

    streams = ("embed",)
    scalars = ("alpha",)

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, v0 = state
        return x + h * (oracle(x) + self.scalar("alpha") * v0), v0


class X0(Gain):
    """X' = X + h (gamma g(X) + alpha X_0): the token's own embedding given again to every substep,
    as in the speed runs on nanoGPT, where skip has a second table."""

    streams = ("x",)
    scalars = ("gamma", "alpha")

    def forward(self, oracle: Oracle, state: State, h: float = 1.0) -> State:
        x, x0 = state
        gamma, alpha = self.scalar("gamma"), self.scalar("alpha")
        return x + gamma * h * oracle(x) + alpha * h * x0, x0


TEMPLATES: dict[str, type[Template]] = {
    "gd": GradientDescent, "polyak": HeavyBall, "nesterov": Nesterov, "tmm": Momentum,
    "imex": Imex, "symplectic": Symplectic, "rmsprop": RMSProp, "adam": Adam, "adamw": AdamW,
    "gain": Gain, "normed": Normed, "frozen": Frozen, "skip": Skip, "x0": X0}


# -----------------------------------------------------------------------------
# Splittings: which oracles are asked, in which order, with which step. An entry is (oracle, h).


def lie_trotter(attention: Oracle, ffns: list[Oracle]) -> list[tuple[Oracle, float]]:
    """Attention, then the FFN (or its sub-MLPs one after the other)."""
    return [(attention, 1.0), *((ffn, 1.0) for ffn in ffns)]


def euler(attention: Oracle, ffns: list[Oracle]) -> list[tuple[Oracle, float]]:
    """One substep of the sum: the parallel block."""
    (ffn,) = ffns

    def both(z: torch.Tensor) -> torch.Tensor:
        return attention(z).to(torch.promote_types(z.dtype, torch.float32)) + ffn(z)

    return [(both, 1.0)]


def strang(attention: Oracle, ffns: list[Oracle]) -> list[tuple[Oracle, float]]:
    """Half attention, FFN, half attention with the same weights (our reading of PRK-Verlet)."""
    return [(attention, 0.5), *((ffn, 1.0) for ffn in ffns), (attention, 0.5)]


def unsplit(attention: Oracle, ffns: list[Oracle]) -> list[tuple[tuple[Oracle, Oracle], float]]:
    """The template gets both oracles and orders them itself."""
    (ffn,) = ffns
    return [((attention, ffn), 1.0)]


SPLITTINGS = {"lie_trotter": lie_trotter, "euler": euler, "strang": strang}


# -----------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """One layer: two oracles, and the substeps that ask them. Names are nanoGPT's."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = ATTENTIONS[config.attention](config)
        self.ln_2 = nn.Identity() if config.hourglass else make_norm(config)  # it has its own
        self.mlp = FFNS[config.ffn](config)
        self.each = config.each
        self.post = config.norm_place == "post"
        self.narrow = config.stream_dtype == "bfloat16"
        template = TEMPLATES[config.template]
        self.split = SPLITTINGS[config.splitting] if template.splittings else unsplit
        n_substeps = len(self.split(*self.oracles()))
        self.steps = nn.ModuleList(template(config, layer, i) for i in range(n_substeps))

    def oracles(self, rope: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Oracle, list[Oracle]]:
        """Attention, and the FFN as one oracle or as its K sub-MLPs. They read bf16 as fp32."""
        def wide(z: torch.Tensor) -> torch.Tensor:
            return z.to(self.ln_1.weight.dtype)

        if self.post:
            return (lambda z: self.ln_1(wide(self.attn(wide(z), rope, cache))),
                    [lambda z: self.ln_2(wide(self.mlp(wide(z))))])
        ffns = [lambda z: self.mlp(self.ln_2(wide(z)))]
        if self.each:
            ffns = [lambda z, ffn=ffn: ffn(wide(z)) for ffn in self.mlp]
        return lambda z: self.attn(self.ln_1(wide(z)), rope, cache), ffns

    def forward(self, state: State, rope: torch.Tensor | None = None,
                cache: KVCache | None = None) -> State:
        """state: x (B, T, C) and the template's streams of the same shape."""
        substeps = self.split(*self.oracles(rope, cache))
        for step, (oracle, h) in zip(self.steps, substeps, strict=True):
            state = step(oracle, state, h)
            if self.narrow:  # a substep computes in fp32, to which learned scalars lift a stream
                state = tuple(stream.bfloat16() for stream in state)
        return state


ROLES = {nn.LayerNorm: "norm", nn.RMSNorm: "norm", nn.Linear: "matrix", nn.Embedding: "embedding"}


def walk(module: nn.Module, path: str = "", around: str | None = None,
         ) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
    """(name, parameter, its module, role) of every parameter, the tied one twice. The role says how
    it starts and which optimiser group it joins: the module's own (role = "matrix"), a norm's, that
    of the module `around` it, or its type's. ValueError where there is none. A template's role is
    that of all in it, that of another module with bare parameters is theirs alone."""
    of_type = next((role for kind, role in ROLES.items() if isinstance(module, kind)), None)
    own = getattr(module, "role", None)
    role = own or ("norm" if of_type == "norm" else around or of_type)
    bare = dict(module.named_parameters(recurse=False))
    for name, p in bare.items():
        if role is None:
            raise ValueError(f"{path}{name}: what is the role of a {type(module).__name__}? Say "
                             f"role = \"matrix\", \"embedding\", \"norm\" or \"scalar\" in it")
        if isinstance(module, Template) and name not in module.learned:
            raise ValueError(f"{path}{name}: a template's parameter starts at a value; make it "
                             f"with self.learn(name, start, range_map, shape)")
        yield f"{path}{name}", p, module, role
    if isinstance(module, Template) or not bare:
        around = own or around
    for name, child in module.named_children():
        yield from walk(child, f"{path}{name}.", around)


class GPT(nn.Module):
    """The language model: embeddings, L blocks, final norm, tied head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.streams = TEMPLATES[config.template].streams
        self.narrow = config.stream_dtype == "bfloat16"
        embedded = "embed" in self.streams and config.velocity_init == "embed"
        second = embedded or config.velocity_init == "add"  # a second table?
        placed = config.position == "learned"  # a table of positions beside each table of tokens
        parts = dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd) if placed else None,
            vte=nn.Embedding(config.vocab_size, config.n_embd) if second else None,
            vpe=nn.Embedding(config.block_size, config.n_embd) if second and placed else None,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=make_norm(config))
        self.transformer = nn.ModuleDict({k: m for k, m in parts.items() if m is not None})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.activation_checkpointing = False  # True: the backward pass computes each block again
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02) for every matrix and table, smaller by 1/sqrt(2 L) for what writes to the
        residual stream (residual_init_scale); their biases 0. Norms, scalars, and what a fork
        brings under those roles, start in their constructors."""
        out_scale = (2 * self.config.n_layer) ** -0.5 if self.config.residual_init_scale else 1.0
        for _, p, module, role in walk(self):
            scale = out_scale if isinstance(module, OutputProjection) else 1.0
            if role in ("matrix", "embedding") and p.ndim > 1:
                nn.init.normal_(p, 0.0, 0.02 * scale)
            elif role in ("matrix", "embedding"):
                nn.init.zeros_(p)

    def embed(self, idx: torch.Tensor, positions: torch.Tensor) -> State:
        """Tokens (B, T) at positions (B or 1, T) -> x and the streams, each (B, T, C)."""
        t = self.transformer

        def look_up(tokens: str, places: str) -> torch.Tensor:
            e = t[tokens](idx)
            return t.drop(e + t[places](positions) if places in t else e)  # (B, T, C)

        x = look_up("wte", "wpe")
        if self.config.velocity_init == "add":
            x = x + look_up("vte", "vpe")  # the control "tables without dynamics"
        if self.config.embed_scale != 1:
            x = self.config.embed_scale * x

        def begin(stream: str) -> torch.Tensor:
            if stream == "x":
                return x
            if stream == "embed" and "vte" in t:
                return look_up("vte", "vpe")
            return torch.full_like(x, {"ones": 1.0, "zeros": 0.0, "embed": 0.0}[stream])

        state = x, *map(begin, self.streams)
        return tuple(stream.bfloat16() for stream in state) if self.narrow else state

    def rope(self, positions: torch.Tensor) -> torch.Tensor | None:
        """With position=rope: cos and sin of positions (B, T) times theta^(-2i/dim), as
        (2, B, 1, T, dim / 2)."""
        if self.config.position != "rope":
            return None
        theta, dim = self.config.rope_theta, self.config.d_head
        wide = torch.promote_types(self.transformer.wte.weight.dtype, torch.float32)
        frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim)
        angles = positions[:, None, :, None] * frequencies  # (B, 1, T, dim / 2)
        return torch.stack((angles.cos(), angles.sin()))

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx (B, T) token ids -> what the head reads (B, T, C). With a cache, idx continues the
        cached tokens. Raises ValueError where all tokens exceed block_size or the cache."""
        c = self.config
        # without a cache they count from 0, as in a new one; (1, T), or (B, T) of ragged rows
        positions = (cache or KVCache()).begin(idx, c.block_size)
        state, rope = self.embed(idx, positions), self.rope(positions)
        for block in self.transformer.h:
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                state = recompute(block, state, rope, use_reentrant=False)
            else:
                state = block(state, rope, cache)
        if cache is not None:
            cache.end()
        norm = self.transformer.ln_f
        return norm(state[0].to(norm.weight.dtype))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None, return_logits: bool = True,
                reduction: Literal["mean", "none"] = "mean",
                ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """idx (B, T) token ids, with a cache as in `hidden` -> (logits, loss).

        With targets (B, T), logits (B, T, vocab_size) and the cross-entropy in nats per token, at
        least fp32, target -1 ignored: the mean, a scalar, or (B, T) with reduction="none". Without,
        logits (B, 1, vocab_size) of the last position, and None. return_logits=False gives None
        for the logits: as an output they would cost a compiled graph memory and time.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x[:, -1:]), None
        return self.head_and_loss(x, targets, return_logits, reduction)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """What the head reads (..., C) -> logits (..., V), for training and all that follows."""
        return self.lm_head(x)

    def head_and_loss(self, x: torch.Tensor, targets: torch.Tensor, return_logits: bool,
                      reduction: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the head reads (B, T, C) and the targets (B, T) -> as `forward` has it."""
        logits = self.logits(x)  # (B, T, V)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction=reduction)
        loss = loss if reduction == "mean" else loss.view_as(targets)
        return (logits if return_logits else None), loss

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None) -> torch.Tensor:
        """Continue idx (B, T >= 1) by max_new_tokens: (B, T + max_new_tokens). temperature 0
        (below 1e-6) is greedy; top_k keeps the k likeliest tokens. When the context is full its
        older half is dropped and the rest read again. (sample.py has a faster one, with more
        options.)"""
        size = self.config.block_size
        cache, unread = KVCache(idx.size(1) + max_new_tokens), idx[:, -size:]
        for _ in range(max_new_tokens):
            if cache.length == size:
                cache, unread = KVCache(), idx[:, -max(1, size // 2):]
            logits = self(unread, cache=cache)[0][:, -1].float()  # (B, V)
            logits[:, self.config.vocab_used or self.config.vocab_size:] = -torch.inf
            if top_k is not None:
                worst_kept = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]
                logits[logits < worst_kept] = -torch.inf
            if temperature < 1e-6:
                unread = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                unread = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
            idx = torch.cat((idx, unread), dim=1)
        return idx

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
        c = self.config
        forward = 2 * c.vocab_size * c.n_embd
        for block in self.transformer.h:
            attention, ffn = (sum(m.weight.numel() for m in part.modules()
                                  if isinstance(m, nn.Linear)) for part in (block.attn, block.mlp))
            attention += c.block_size * c.d_attn
            attention *= 2 if c.splitting == "strang" else 1
            forward += 2 * block.steps[0].oracle_calls * (attention + ffn)
        return 3 * forward

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak: float = 312e12) -> float:
        """Model FLOPs utilisation: fwdbwd_per_iter sequences per device in dt seconds, as a share
        of the device's `peak` FLOP/s (default: an A100 in bf16)."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def parameter_roles(self) -> dict[str, dict[str, nn.Parameter]]:
        """matrix (2-D, in the blocks), embedding (all tables, the tied head, what has more than two
        dimensions), norm (gains and biases), scalar (the templates'): name -> parameter, every
        parameter in exactly one."""
        roles: dict[str, dict] = {"matrix": {}, "embedding": {}, "norm": {}, "scalar": {}}
        names = dict(self.named_parameters())  # without the head's matrix, which is the token table
        for name, p, _, role in walk(self):
            if role == "matrix" and p.ndim != 2:
                role = "norm" if p.ndim < 2 else "embedding"
            if name in names:
                roles[role][name] = p
        return roles

    def configure_optimizers(self, weight_decay: float, learning_rate: float,
                             betas: tuple[float, float], device_type: str,
                             scalar_lr: float | None = None, eps: float = 1e-8,
                             roles: tuple[str, ...] = ("matrix", "embedding", "norm", "scalar"),
                             ) -> torch.optim.AdamW:
        """AdamW over the parameters of `roles`: matrices and tables decay, norms, biases and
        scalars do not; scalars at scalar_lr (default: learning_rate)."""
        groups = [dict(params=list(params.items()), role=role,
                       lr=learning_rate if role != "scalar" or scalar_lr is None else scalar_lr,
                       weight_decay=weight_decay if role in ("matrix", "embedding") else 0.0)
                  for role, params in self.parameter_roles().items() if role in roles and params]
        return torch.optim.AdamW(groups, betas=betas, eps=eps,
                                 fused=device_type in ("cuda", "cpu", "mps"))

    # --- weights from elsewhere ---

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context; cuts the position tables. Raises ValueError if it would grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: must lie in 1..{self.config.block_size}, "
                             f"the model's own; choose a smaller one")
        self.config = replace(self.config, block_size=block_size)
        for name in {"wpe", "vpe"} & self.transformer.keys():
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
        hf = source.config
        gelus = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
        for name, known in dict(
                layer_norm_epsilon=[1e-5], scale_attn_weights=[True], add_cross_attention=[False],
                scale_attn_by_inverse_layer_idx=[False], activation_function=gelus).items():
            if getattr(hf, name) not in known:
                raise ValueError(f"it is no GPT-2 that this model can be: it has "
                                 f"{name}={getattr(hf, name)}")
        if source.lm_head.weight is not source.transformer.wte.weight:
            raise ValueError("it has a head of its own, not its token table (tied)")
        if info["missing_keys"]:
            raise ValueError(f"it has no {sorted(info['missing_keys'])[0]}")
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
