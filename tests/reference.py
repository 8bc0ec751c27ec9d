"""The whole family once more, in float64, from the equations alone.

The tests compare `model.py` with this file, and a reader can compare this file with the papers:
YuriiFormer (arXiv 2601.23236), Momentum Streams (2605.24425), Hourglass FFN (2602.06471). It
shares no code with `model.py`: no module, no fused attention, no layer_norm; a weight is a tensor
looked up by its state-dict name. X and Z are (B, T, d); primes are spelt `_new`.
"""

import torch

EPS = 1e-5  # of every LayerNorm and RMSNorm; the Adam family's own eps is 1e-8
MOMENTUM = ("polyak", "nesterov", "tmm")
CONTROLS = ("gain", "normed", "frozen", "skip", "x0")
SCALARS = {"gd": 0, "polyak": 2, "nesterov": 3, "tmm": 4, "imex": 3, "symplectic": 3,
           "rmsprop": 2, "adam": 3, "adamw": 4, "gain": 1, "normed": 1, "frozen": 2, "skip": 1,
           "x0": 2}  # per substep (imex and symplectic have one)


# ---------------------------------------------------------------------------- small functions

def sigmoid(r):
    return 1 / (1 + torch.exp(-r))


def softplus(r):
    return torch.log1p(torch.exp(r))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def gelu_tanh(x):
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(s):
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def rms_norm(x, gain, eps=EPS):
    return gain * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def layer_norm(x, gain, bias, eps=EPS):
    x = x - x.mean(-1, keepdim=True)
    return rms_norm(x, gain, eps) + bias


def rope(x, theta):
    """Turn the pair (i, i + D/2) of position t by the angle t theta^(-2i/D). x: (B, H, T, D)"""
    T, D = x.shape[-2:]
    i = torch.arange(D // 2, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * theta ** (-2 * i / D)  # (T, D/2)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# --------------------------------------------------------------- what all variants are made of

def norm(c, P, name, x, eps=EPS):
    gain = P[name + ".weight"]
    if c.norm == "rmsnorm":
        return rms_norm(x, gain, eps)
    return layer_norm(x, gain, P[name + ".bias"] if c.bias else 0, eps)


def linear(c, P, name, x):
    y = x @ P[name + ".weight"].T
    return y + P[name + ".bias"] if c.bias else y


def attention(c, P, name, u):
    """A(u): o W_O, with o = softmax(q k^T / sqrt(d_head) + causal) v."""
    B, T, d = u.shape
    D = c.head_dim or d // c.n_head
    d_a = c.n_head * D
    q, k, v = linear(c, P, name + ".c_attn", u).split(d_a, -1)
    if c.qk_norm:  # on the packed width, before the split into heads and before RoPE
        q = rms_norm(q, P[name + ".q_norm.weight"])
        k = rms_norm(k, P[name + ".k_norm.weight"])
    q, k, v = (z.view(B, T, c.n_head, D).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
    if c.position == "rope":
        q, k = rope(q, c.rope_theta), rope(k, c.rope_theta)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(future, -torch.inf)
    o = (softmax(scores) @ v).transpose(1, 2).reshape(B, T, d_a)
    return linear(c, P, name + ".c_proj", o)


def mlp(c, P, name, y):
    act = gelu_tanh if c.activation == "gelu_tanh" else gelu
    return linear(c, P, name + ".c_proj", act(linear(c, P, name + ".c_fc", y)))


def swiglu(c, P, name, y):
    gated = silu(linear(c, P, name + ".c_gate", y)) * linear(c, P, name + ".c_up", y)
    return linear(c, P, name + ".c_proj", gated)


# ------------------------------------------------------------------------------------ one layer

def oracles(c, P, layer):
    """g_a and the list of the FFN's residual pieces (K of them for the hourglass, else one)."""

    def g_a(Z):
        if c.norm_place == "post":
            return norm(c, P, layer + "ln_1", attention(c, P, layer + "attn", Z))
        return attention(c, P, layer + "attn", norm(c, P, layer + "ln_1", Z))

    def sub_mlp(i):
        m = f"{layer}mlp.{i}."
        return lambda Z: swiglu(c, P, m + "ffn", norm(c, P, m + "norm", Z))

    def conventional(Z):
        ffn = swiglu if c.ffn == "swiglu" else mlp
        if c.norm_place == "post":
            return norm(c, P, layer + "ln_2", ffn(c, P, layer + "mlp", Z))
        return ffn(c, P, layer + "mlp", norm(c, P, layer + "ln_2", Z))

    pieces = [sub_mlp(i) for i in range(c.ffn_depth)] if c.ffn == "hourglass" else [conventional]
    return g_a, pieces


def chain(pieces):
    """The oracle z_K - z_0 of z_{i+1} = z_i + m_i(z_i)."""

    def g_m(Z):
        z = Z
        for m in pieces:
            z = z + m(z)
        return z - Z

    return g_m


def substeps(c, g_a, pieces):
    """What the splitting runs, in order: pairs (oracle, step h)."""
    g_m = chain(pieces)
    F = [(g, 1) for g in pieces] if c.ffn == "hourglass" and c.ffn_substeps == "each" \
        else [(g_m, 1)]
    if c.splitting == "euler":
        return [(lambda Z: g_a(Z) + g_m(Z), 1)]
    if c.splitting == "strang":
        return [(g_a, 1 / 2), *F, (g_a, 1 / 2)]
    return [(g_a, 1), *F]


def layer_step(c, P, layer, X, V, S, velocity_eps):
    """One layer of any template: (X, V, S) -> (X', V', S'). V is also Adam's M, and X_0."""
    g_a, pieces = oracles(c, P, layer)
    unit = softplus if c.scalar_map == "softplus" else sigmoid  # of mu and beta

    def raw(s, name):
        return P[f"{layer}steps.{s}.{name}"]

    def N(s, x):  # N_v of the momentum templates, N_u of the Adam family
        return norm(c, P, f"{layer}steps.{s}.norm", x, velocity_eps)

    if c.template == "imex":
        g_m, Z = chain(pieces), X
        beta = unit(raw(0, "beta"))
        gamma_a, gamma_m = softplus(raw(0, "gamma_a")), softplus(raw(0, "gamma_m"))
        for _ in range(c.imex_steps):
            V_new = beta * V + gamma_a * g_a(Z) + gamma_m * g_m(Z)
            if c.velocity_norm == "update":
                V_new = N(0, V_new)
            Z = X + V_new
        return Z, V_new, S

    if c.template == "symplectic":
        beta, gamma, eta = unit(raw(0, "beta")), softplus(raw(0, "gamma")), softplus(raw(0, "eta"))
        V = N(0, beta * V + gamma * g_a(X))
        return X + eta * chain(pieces)(V), V, S

    for s, (g, h) in enumerate(substeps(c, g_a, pieces)):
        if c.template == "gd":
            X = X + h * g(X)
        elif c.template in MOMENTUM:
            beta, gamma = unit(raw(s, "beta")), softplus(raw(s, "gamma"))
            mu = 0 if c.template == "polyak" else unit(raw(s, "mu"))
            nu = softplus(raw(s, "nu")) if c.template == "tmm" else 1
            Y = X + mu * V
            V = beta * V + gamma * h * g(Y)
            if c.velocity_norm == "update":
                V = N(s, V)
            X = X + h * nu * (N(s, V) if c.velocity_norm == "read" else V)
        elif c.template == "gain":
            X = X + h * softplus(raw(s, "gamma")) * g(X)
        elif c.template == "normed":
            X = X + h * N(s, softplus(raw(s, "gamma")) * h * g(X))
        elif c.template == "frozen":
            beta, gamma = unit(raw(s, "beta")), softplus(raw(s, "gamma"))
            X = X + h * N(s, beta * V + gamma * h * g(X))
        elif c.template == "skip":
            X = X + h * (g(X) + raw(s, "alpha") * V)
        elif c.template == "x0":
            X = X + h * (softplus(raw(s, "gamma")) * g(X) + raw(s, "alpha") * V)
        else:
            gamma, G = softplus(raw(s, "gamma")), g(X)
            b2 = sigmoid(raw(s, "beta2"))
            S = b2 * S + (1 - b2) * G**2
            if c.template != "rmsprop":
                b1 = sigmoid(raw(s, "beta1"))
                V = b1 * V + (1 - b1) * G
            M = G if c.template == "rmsprop" else V
            lam = sigmoid(raw(s, "lam")) if c.template == "adamw" else 0
            X = (1 - lam) * X + gamma * N(s, M / (torch.sqrt(S) + 1e-8))
    return X, V, S


# ------------------------------------------------------------------------------- the whole model

def has_tables(c):
    """Whether there is a second embedding: V_0, Adam's M_0, or the control `add`."""
    if c.template in ("gd", "gain", "normed"):
        return c.velocity_init == "add"
    return c.template not in ("rmsprop", "x0") and c.velocity_init == "embed"


def forward(c, state_dict, idx, velocity_eps=EPS):
    """Logits (B, T, V) of the token ids idx (B, T). velocity_eps is the eps of N_v and N_u."""
    P = {name: w.detach().double() for name, w in state_dict.items()}

    def embed(token, position):
        E = P[f"transformer.{token}.weight"][idx]
        if c.position == "learned":
            E = E + P[f"transformer.{position}.weight"][: idx.shape[1]]
        return E

    X = embed("wte", "wpe")
    V = embed("vte", "vpe") if has_tables(c) else torch.zeros_like(X)
    S = torch.ones_like(X)
    if c.velocity_init == "add":
        X = X + V
    X = c.embed_scale * X
    V = X if c.template == "x0" else V
    for i in range(c.n_layer):
        X, V, S = layer_step(c, P, f"transformer.h.{i}.", X, V, S, velocity_eps)
    return norm(c, P, "transformer.ln_f", X) @ P["transformer.wte.weight"].T


# ------------------------------------------------------------------------------- parameter counts

def widths(c):
    """d, d_a, d_h, and K."""
    d, K = c.n_embd, c.ffn_depth if c.ffn == "hourglass" else 1
    d_h = c.ffn_hidden or (4 * d // 5 if c.ffn == "hourglass" else 4 * d)
    return d, c.n_head * (c.head_dim or d // c.n_head), d_h, K


def n_matrices(c):
    """The non-embedding matrices; hourglass.md's N = L (4 d d_a + 3 K d d_h)."""
    d, d_a, d_h, K = widths(c)
    return c.n_layer * (4 * d * d_a + (2 if c.ffn == "mlp" else 3) * K * d * d_h)


def n_substeps(c):
    """Substeps that own scalars and a norm, per layer."""
    if c.template in ("gd", "imex", "symplectic"):
        return 0 if c.template == "gd" else 1
    return len(substeps(c, None, [None] * (c.ffn_depth if c.ffn == "hourglass" else 1)))


def n_parameters(c):
    """Every parameter, the tied head once: matrices, tables, norms, scalars, biases."""
    (d, d_a, d_h, K), steps = widths(c), n_substeps(c)
    tables = (c.vocab_size + (c.block_size if c.position == "learned" else 0)) * d
    normless = c.template in ("gain", "skip", "x0") or (
        c.template in MOMENTUM + ("imex",) and c.velocity_norm == "none")
    norms = d * (c.n_layer * (1 + K + (0 if normless else steps)) + 1)
    if c.bias and c.norm == "layernorm":
        norms *= 2
    layer = steps * SCALARS[c.template] + (2 * d_a if c.qk_norm else 0)
    if c.bias:
        layer += 3 * d_a + d + K * ((1 if c.ffn == "mlp" else 2) * d_h + d)
    return n_matrices(c) + tables * (2 if has_tables(c) else 1) + norms + c.n_layer * layer
