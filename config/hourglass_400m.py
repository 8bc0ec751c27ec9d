"""The 400M hourglass (arXiv 2602.06471): swiglu_400m with as many matrix parameters in a wider
residual stream, fewer layers, narrow attention and 4 sub-MLPs a layer.

Cost:     8.1 G tokens, 2.4e19 FLOP; 18.4 h of one H100 (docs/speed.md).
Expected: on a par with swiglu_400m, the paper says without a loss table; not measured here.
"""

from config.swiglu_400m import *

out_dir = "out-hourglass-400m"
n_layer = 12
n_embd = 1664
n_head = 16
head_dim = 64  # attention width 1024 < 1664
ffn = "hourglass"
ffn_hidden = 1344
ffn_depth = 4
