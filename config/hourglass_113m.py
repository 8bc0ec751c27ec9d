"""The 113M hourglass (arXiv 2602.06471): swiglu_113m with as many matrix parameters in a wider
residual stream, fewer layers, narrow attention and 4 sub-MLPs a layer.

Cost:     2.4 G tokens, 2.6e18 FLOP; 2.0 h of one H100 (docs/speed.md).
Expected: on a par with swiglu_113m, the paper says without a loss table; not measured here.
"""

from config.swiglu_113m import *

out_dir = "out-hourglass-113m"
n_layer = 6
n_embd = 1248
n_head = 12
head_dim = 64  # attention width 768 < 1248
ffn = "hourglass"
ffn_hidden = 1008
ffn_depth = 4
