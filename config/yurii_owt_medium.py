"""YuriiFormer medium on OpenWebText: gpt_owt_medium with another template.

Cost:     14.7 G tokens, 3.4e19 FLOP; 27.6 h of one H100 (docs/speed.md).
Expected: best validation loss 2.707 in the paper (arXiv 2601.23236; our reading of its figure).
"""

from config.gpt_owt_medium import *

out_dir = "out-yurii-owt-medium"
template = "nesterov"
