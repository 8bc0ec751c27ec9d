"""Momentum on a GPU: what stands between two oracles as one operation, its gradient as one kernel.

A substep of polyak, nesterov or tmm, and what the next oracle reads (mu' and N are the next one's):

    u = beta v + gamma g;   v' = N_v(u);   x' = x + nu v';   y' = x' + mu' v';   z' = N(y')

Forward, inductor fuses these equations well; backward, it makes several kernels that read each
tensor again, and the one below takes a third of their time (an H100, 16,384 rows of 768 in fp32:
145 us instead of 419). support/fuse.py gives it to a model.
"""

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # without CUDA there is none
    triton = None

EPS = 1e-5


# -----------------------------------------------------------------------------
# The gradient. Norms: columns[0:2] are the gain and bias of N_v, columns[2:4] of N; without `norm`,
# N is the identity (an hourglass normalises by itself); `rms`: both are RMSNorm.


def normalise(u: torch.Tensor, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows u (..., C) -> (u - mean) / std, and 1 / std (..., 1)."""
    centred = u if rms else u - u.mean(dim=-1, keepdim=True)
    rstd = (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return centred * rstd, rstd


def norm_gradient(a: torch.Tensor, hat: torch.Tensor, rstd: torch.Tensor,
                  rms: bool) -> torch.Tensor:
    """The gradient of what `normalise` reads, from that of its output `hat`."""
    along = a - hat * (a * hat).mean(dim=-1, keepdim=True)
    return rstd * (along if rms else along - a.mean(dim=-1, keepdim=True))


def gradients(gx: torch.Tensor, gv: torch.Tensor, gz: torch.Tensor, x_new: torch.Tensor,
              v: torch.Tensor, g: torch.Tensor, scalars: torch.Tensor, columns: torch.Tensor,
              norm: bool, rms: bool) -> list[torch.Tensor]:
    """Gradients of x', v', z' (..., C) -> those of x, v, g (..., C), and sums (8, C): of the four
    scalars by column, and of the columns. All that the forward pass keeps is x', v and g."""
    streams = (x_new, v, g)
    beta, gamma, nu, mu = scalars
    w, b, w2, _ = columns
    gx, gv, gz, x_new, v, g = (t.to(scalars.dtype) for t in (gx, gv, gz, x_new, v, g))
    hat, rstd = normalise(beta * v + gamma * g, rms)
    v_new = hat * w + b
    stored = v_new.to(streams[1].dtype).to(v_new.dtype)
    gy, hat2 = gz, gz
    if norm:
        hat2, rstd2 = normalise(x_new + mu * stored, rms)
        gy = norm_gradient(gz * w2, hat2, rstd2, rms)
    gx = gx + gy
    gv = gv + mu * gy + nu * gx  # of v', altogether
    gu = norm_gradient(gv * w, hat, rstd, rms)
    sums = torch.stack((gu * v, gu * g, gx * v_new, gy * stored, gv * hat, gv, gz * hat2, gz))
    outputs = zip((gx, beta * gu, gamma * gu), streams, strict=True)
    return [*(t.to(like.dtype) for t, like in outputs), sums.flatten(1, -2).sum(dim=1)]


# -----------------------------------------------------------------------------
# The same as a kernel: a program takes every n-th row and keeps sums of its own

if triton is not None:
    @triton.jit
    def normalise_row(u, live, C: tl.constexpr, rms: tl.constexpr):
        if not rms:
            u -= tl.sum(u) / C
        u = tl.where(live, u, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(u * u) / C + 1e-5)
        return u * rstd, rstd

    @triton.jit
    def norm_gradient_row(a, hat, rstd, C: tl.constexpr, rms: tl.constexpr):
        along = a - hat * (tl.sum(a * hat) / C)
        if not rms:
            along -= tl.sum(a) / C
        return along * rstd

    @triton.jit
    def kernel(gx_ptr, gv_ptr, gz_ptr, x_ptr, v_ptr, g_ptr, scalars, columns, dx_ptr, dv_ptr,
               dg_ptr, sums_ptr, n_rows, norm: tl.constexpr, rms: tl.constexpr, bias: tl.constexpr,
               C: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr):
        """`gradients` of rows of C columns, in a block of a power of two."""
        cols = tl.arange(0, BLOCK)
        live = cols < C
        beta, gamma = tl.load(scalars), tl.load(scalars + 1)
        nu, mu = tl.load(scalars + 2), tl.load(scalars + 3)
        w = tl.load(columns + cols, mask=live, other=0.0)
        b = tl.load(columns + C + cols, mask=live, other=0.0)
        w2 = tl.load(columns + 2 * C + cols, mask=live, other=0.0)
        zeros = tl.zeros((BLOCK,), tl.float32)
        sum_beta, sum_gamma, sum_nu, sum_mu = zeros, zeros, zeros, zeros
        sum_w, sum_b, sum_w2, sum_b2 = zeros, zeros, zeros, zeros
        first = tl.program_id(0).to(tl.int64)  # as addresses need
        for row in tl.range(first, n_rows, tl.num_programs(0), num_stages=STAGES):
            # the hint has a thread take as many elements of fp32 as of bf16
            at = tl.max_contiguous(row * C + cols, VECTOR)
            v = tl.load(v_ptr + at, mask=live, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
            gx = tl.load(gx_ptr + at, mask=live, other=0.0).to(tl.float32)
            gv = tl.load(gv_ptr + at, mask=live, other=0.0).to(tl.float32)
            gy = tl.load(gz_ptr + at, mask=live, other=0.0).to(tl.float32)
            hat, rstd = normalise_row(beta * v + gamma * g, live, C, rms)
            v_new = hat * w + b
            stored = v_new.to(dv_ptr.dtype.element_ty).to(tl.float32)
            if norm:
                x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
                hat2, rstd2 = normalise_row(x + mu * stored, live, C, rms)
                sum_w2 += gy * hat2
                if bias:
                    sum_b2 += gy
                gy = norm_gradient_row(gy * w2, hat2, rstd2, C, rms)
            gx += gy
            gv += mu * gy + nu * gx
            sum_mu += gy * stored
            sum_nu += gx * v_new
            sum_w += gv * hat
            if bias:
                sum_b += gv
            gu = norm_gradient_row(gv * w, hat, rstd, C, rms)
            sum_beta += gu * v
            sum_gamma += gu * g
            tl.store(dx_ptr + at, gx.to(dx_ptr.dtype.element_ty), mask=live)
            tl.store(dv_ptr + at, (beta * gu).to(dv_ptr.dtype.element_ty), mask=live)
            tl.store(dg_ptr + at, (gamma * gu).to(dg_ptr.dtype.element_ty), mask=live)
        out = sums_ptr + tl.program_id(0) * 8 * C + cols
        tl.store(out, sum_beta, mask=live)
        tl.store(out + C, sum_gamma, mask=live)
        tl.store(out + 2 * C, sum_nu, mask=live)
        tl.store(out + 3 * C, sum_mu, mask=live)
        tl.store(out + 4 * C, sum_w, mask=live)
        tl.store(out + 5 * C, sum_b, mask=live)
        tl.store(out + 6 * C, sum_w2, mask=live)
        tl.store(out + 7 * C, sum_b2, mask=live)


@torch.library.custom_op("nanoyurii::substep_gradients", mutates_args=())
def kernel_gradients(gx: torch.Tensor, gv: torch.Tensor, gz: torch.Tensor, x_new: torch.Tensor,
                     v: torch.Tensor, g: torch.Tensor, scalars: torch.Tensor,
                     columns: torch.Tensor, norm: bool, rms: bool, bias: bool,
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gradients`, in one kernel (an operator, so that torch.compile leaves it whole)."""
    C = v.size(-1)
    n_rows, block = v.numel() // C, max(16, triton.next_power_of_2(C))
    warps = max(1, min(16, block // 256))
    vector = max(1, min(4 if v.element_size() == 4 else 8, block // (32 * warps)))
    grid = 2  # in Triton's interpreter
    if v.is_cuda:  # a multiprocessor has no registers for more
        grid *= torch.cuda.get_device_properties(v.device).multi_processor_count
    grid = min(grid, n_rows)
    outputs = [torch.empty_like(t) for t in (x_new, v, g)]
    sums = v.new_empty((grid, 8, C), dtype=torch.float32)
    kernel[(grid,)](gx, gv, gz, x_new, v, g, scalars, columns, *outputs, sums, n_rows, norm, rms,
                    bias, C, block, vector, STAGES=3 if block <= 2048 else 2, num_warps=warps)
    return *outputs, sums.sum(dim=0)


@kernel_gradients.register_fake
def _(gx, gv, gz, x_new, v, g, scalars, columns, norm, rms, bias):
    return (*(torch.empty_like(t) for t in (x_new, v, g)),
            v.new_empty((8, v.size(-1)), dtype=torch.float32))


# -----------------------------------------------------------------------------
# The operation


class Substep(torch.autograd.Function):
    """x, v, g (..., C), scalars (4,): beta, gamma, nu, mu', columns (4, C) -> x', v', z'."""

    @staticmethod
    def forward(ctx, x, v, g, scalars, columns, norm, rms, bias, z_dtype):
        beta, gamma, nu, mu = scalars.split(1)  # of shape (1,): they lift bf16 to fp32
        w, b, w2, b2 = columns

        def normed(u: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            if rms:
                return F.rms_norm(u, gain.shape, gain, EPS)
            return F.layer_norm(u, gain.shape, gain, shift if bias else None, EPS)

        v_new = normed(beta * v + gamma * g, w, b)
        x_new = (x + nu * v_new).to(x.dtype)
        v_new = v_new.to(v.dtype)
        ctx.kind = norm, rms, bias
        ctx.save_for_backward(x_new, v, g, scalars, columns)
        y = x_new + mu * v_new
        return x_new, v_new, normed(y, w2, b2).to(z_dtype) if norm else y

    @staticmethod
    def backward(ctx, *upstream):
        norm, rms, bias = ctx.kind
        tensors = [t.contiguous() for t in (*upstream, *ctx.saved_tensors)]
        if triton is not None and tensors[0].is_cuda:
            dx, dv, dg, sums = kernel_gradients(*tensors, norm, rms, bias)
        else:
            dx, dv, dg, sums = gradients(*tensors, norm, rms)
        return dx, dv, dg, sums[:4].sum(dim=1), sums[4:], None, None, None, None
