"""What only a GPU can show; `make gpu` runs these, elsewhere they are skipped. The CPU's tests of
the same are in the files of the parts."""

import pytest
import torch
from conftest import assert_same_end, in_ranks, largest_difference, load, losses, tensors
from test_substep import kernel_against_formula
from variants import IDX, VARIANTS, build

from model import GPT, GPTConfig, KVCache
from sample import DecodingCache, store_matrices, stream
from support.fuse import fuse

DEVICE = "cuda"
GPU = dict(device=DEVICE, dtype="bfloat16", compile=True, template="nesterov")
pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                 reason="no GPU here")]


def test_the_kernel():
    kernel_against_formula(DEVICE, (16, 96, 768, 1001, 1600, 4096))


@pytest.mark.parametrize("options", [dict(), dict(norm="rmsnorm", position="rope", ffn="swiglu"),
                                     dict(template="tmm", bias=True, stream_dtype="bfloat16")])
def test_fused_runs_are_plain_ones(run, tmp_path, options, capsys):
    """Compiled, to bf16's rounding."""
    for fused in (True, False):
        run(tmp_path / str(fused), fused=fused, **GPU | options | dict(max_iters=20))
    assert "momentum fused" in capsys.readouterr().out
    assert abs(losses(tmp_path / "True") - losses(tmp_path / "False"))[:, 0].max() < 2e-2


def test_fp16_with_its_scaler(run, tmp_path):
    run(tmp_path, **GPU | dict(dtype="float16", max_iters=20))
    assert losses(tmp_path)[-1, 0] < losses(tmp_path)[0, 0]


def test_deterministic_runs_and_resuming(run, tmp_path):
    """Compiled, bit for bit."""
    options = GPU | dict(deterministic=True)
    try:
        for name in ("a", "b"):
            run(tmp_path / name, **options)
        assert_same_end(tmp_path / "a", tmp_path / "b")
        run(tmp_path / "c", **options | dict(max_iters=3, lr_decay_iters=6))
        run(tmp_path / "c", init_from="resume", **options)
        assert largest_difference(tensors(tmp_path / "c"), tensors(tmp_path / "a")) == 0
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["gpt", "nesterov-llama", "hourglass-strang"])
def test_compiled_decoding(name):
    """With CUDA graphs, over a full context."""
    model, prompt = build(torch.float32, **VARIANTS[name]).to(DEVICE), IDX.to(DEVICE)
    expected = torch.stack(list(stream(model, prompt, 30, 0)), 1)
    torch._dynamo.reset()
    for how in (dict(), dict(tune=True)):
        found = torch.stack(list(stream(model, prompt, 30, 0, compile=True, **how)), 1)
        assert torch.equal(found, expected)
    store_matrices(model, torch.bfloat16)
    drawn = [torch.stack(list(stream(model, prompt, 30, 1.0, 5, seed=seed, compile=True)), 1)
             for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("n_head", [2, 6, 12])
@torch.no_grad()
def test_a_step_in_bf16_is_the_pass_over_all(n_head):
    """Whatever kernel attends: over a cache of fixed length and its mask, and without a mask."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=n_head, n_embd=64 * n_head, block_size=128,
                          vocab_size=64)).eval().to(DEVICE)
    store_matrices(model, torch.bfloat16)
    idx = torch.randint(64, (3, 110), device=DEVICE)
    expected = model.logits(model.hidden(idx))  # (3, 110, 64)
    fixed = DecodingCache(120)
    fixed.crop(torch.zeros(3, dtype=torch.long, device=DEVICE))
    for cache in (fixed, KVCache(120)):
        model(idx[:, :100], cache=cache)
        for t in range(100, 110):
            step = model(idx[:, t:t + 1], cache=cache)[0][:, 0]
            assert (step - expected[:, t]).norm() < 0.03 * expected[:, t].norm()


def test_two_processes_on_one_gpu(run, job, tmp_path):
    """Over gloo; the gradients are those of one process."""
    options = GPU | dict(dtype="float32", device=f"{DEVICE}:0")
    in_ranks(2, [job(tmp_path / "two", backend="gloo", **options)])
    run(tmp_path / "one", **options)
    assert load(tmp_path / "two")["iter_num"] == 6
    assert abs(losses(tmp_path / "two") - losses(tmp_path / "one"))[:, 0].max() < 1e-3


def test_the_check_takes_the_kernel():
    model = build(torch.float32, **VARIANTS["nesterov-lie_trotter"]).to(DEVICE)
    assert fuse(model, None, torch.device(DEVICE)) == "momentum fused"
