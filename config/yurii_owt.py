"""YuriiFormer (Nesterov + Lie-Trotter) on OpenWebText: gpt_owt with another template.

Cost:     14.7 G tokens, 1.2e19 FLOP; 9.7 h of one H100 (docs/speed.md).
Expected: best validation loss 2.920 in the paper (arXiv 2601.23236), 2.914 in a reproduction.
"""

from config.gpt_owt import *

out_dir = "out-yurii-owt"
template = "nesterov"
