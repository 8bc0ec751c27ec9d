"""The 8B hourglass (arXiv 2602.06471): swiglu_8b with as many matrix parameters in a wider
residual stream, fewer layers, narrow attention and 4 sub-MLPs a layer.

Cost:     100.0 G tokens, 5.2e+21 FLOP; about 152 days of one H100 at 40 % MFU (computed).
Memory:   as swiglu_8b.
Expected: on a par with swiglu_8b, the paper says without a loss table; not measured here.
"""

from config.swiglu_8b import *

out_dir = "out-hourglass-8b"
n_layer = 22
n_embd = 4992
n_head = 32
head_dim = 128  # attention width 4096 < 4992
ffn = "hourglass"
ffn_hidden = 4544
ffn_depth = 4
