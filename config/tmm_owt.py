"""TMMFormer (triple momentum, arXiv 2605.24425) on OpenWebText: gpt_owt with another template.

Cost:     14.7 G tokens, 1.2e19 FLOP; 9.9 h of one H100 (docs/speed.md).
Expected: best validation loss 2.908 in a reproduction.
"""

from config.gpt_owt import *

out_dir = "out-tmm-owt"
template = "tmm"
