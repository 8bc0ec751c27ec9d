"""The 906M hourglass (arXiv 2602.06471): swiglu_906m with as many matrix parameters in a wider
residual stream, fewer layers, narrow attention and 4 sub-MLPs a layer.
The paper's first version has one of 1B, 649 M in attention and 425 M in the FFN. There is no preset
for it: several shapes round to these numbers, from 15 layers of 3288 to 24 of 2600, but none with d
a multiple of 64, as heads are wide, and with d / L in the paper's best range, 100 to 250.

Cost:     18.0 G tokens, 1.3e+20 FLOP; about 94 h of one H100 at 40 % MFU (computed).
Expected: on a par with swiglu_906m, the paper says without a loss table; not measured here.
"""

from config.swiglu_906m import *

out_dir = "out-hourglass-906m"
n_layer = 12
n_embd = 2496
n_head = 16
head_dim = 96  # attention width 1536 < 2496
ffn = "hourglass"
ffn_hidden = 2016
ffn_depth = 4
