"""GPT-2 medium on OpenWebText with the paper's recipe: gpt_owt, larger.

Cost:     14.7 G tokens, 3.4e19 FLOP; 25.0 h of one H100 (docs/speed.md).
Expected: best validation loss 2.775 in the paper (arXiv 2601.23236; our reading of its figure).
"""

from config.gpt_owt import *

out_dir = "out-gpt-owt-medium"
n_layer = 24
n_head = 16
n_embd = 1024
muon_lr = 0.006
