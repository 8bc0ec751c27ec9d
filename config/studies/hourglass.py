"""Study: hourglass against SwiGLU, matched in matrix parameters (arXiv 2602.06471).

The base pair is built as the paper's are: attention width kept, four sub-MLPs, d_h = 0.8 d, half
the layers. The others change one thing each, and their bottleneck is solved for.

Data:     as suite.py
Run:      python bench.py compare config/studies/hourglass.py
Cost:     40 runs of 1.0 M tokens.
"""

from config.studies.suite import *

study = "hourglass"
out_dir = "out-study-hourglass"
norm = "rmsnorm"
position = "rope"
rope_theta = 10_000.0
qk_norm = True
residual_init_scale = False

n_layer = 3
n_head = 4
head_dim = 32  # attention width 128
n_embd = 208
ffn = "hourglass"
ffn_depth = 4
ffn_hidden = 168
match = "matrices"
solve = "ffn_hidden"
variants = (
    "SwiGLU, 6 layers of 128: ffn=swiglu n_layer=6 n_embd=128 ffn_hidden=512",
    "hourglass, 3 of 208, K = 4: ",
    "K = 2: ffn_depth=2",
    "K = 1: ffn_depth=1",
    "wide attention: head_dim=52",
    "6 layers of 144: n_layer=6 n_embd=144",
    "2 layers of 256: n_layer=2 n_embd=256",
    "hourglass, 6 of 128: n_layer=6 n_embd=128",
)
pairs = (
    "K = 2 - hourglass, 3 of 208, K = 4",
    "K = 1 - hourglass, 3 of 208, K = 4",
    "wide attention - hourglass, 3 of 208, K = 4",
    "6 layers of 144 - hourglass, 3 of 208, K = 4",
    "2 layers of 256 - hourglass, 3 of 208, K = 4",
    "hourglass, 6 of 128 - hourglass, 3 of 208, K = 4",
)
