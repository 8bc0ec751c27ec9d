"""Hourglass and momentum in one model: hourglass_113m as YuriiFormer on OpenWebText, with gpt_owt's
recipe. It has 239 M parameters, 126 M of them in the tables of x and V; yurii_owt has 164 M.
Nobody has published this combination. The other reading, a momentum substep for every sub-MLP, is
--ffn_substeps=each.

Cost:     14.7 G tokens, 1.6e19 FLOP; 13.7 h of one H100 (docs/speed.md).
Expected: not measured.
"""

from config.gpt_owt import *

out_dir = "out-hourglass-yurii-owt"
template = "nesterov"

# wide residual stream, few layers, attention 12 x 64 = 768 < 1248, four sub-MLPs of width 1008
n_layer = 6
n_embd = 1248
n_head = 12
head_dim = 64
ffn = "hourglass"
ffn_hidden = 1008
ffn_depth = 4
norm = "rmsnorm"
position = "rope"
rope_theta = 500_000.0
qk_norm = True
residual_init_scale = False
