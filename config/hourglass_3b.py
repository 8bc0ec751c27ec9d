"""The 3B hourglass (arXiv 2602.06471): swiglu_3b with as many matrix parameters in a wider
residual stream, fewer layers, narrow attention and 4 sub-MLPs a layer.

Cost:     60.0 G tokens, 1.4e+21 FLOP; about 40 days of one H100 at 40 % MFU (computed).
Memory:   as swiglu_3b.
Expected: on a par with swiglu_3b, the paper says without a loss table; not measured here.
"""

from config.swiglu_3b import *

out_dir = "out-hourglass-3b"
n_layer = 18
n_embd = 3696
n_head = 24
head_dim = 128  # attention width 3072 < 3696
ffn = "hourglass"
ffn_hidden = 2944
ffn_depth = 4
