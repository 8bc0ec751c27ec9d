"""Heavy-ball YuriiFormer on TinyStories: gpt_tinystories with another template.

Cost:     4.9 G tokens, 3.9e18 FLOP; 3.2 h of one H100 (docs/speed.md).
Expected: best validation loss 1.083 in the paper (arXiv 2601.23236).
"""

from config.gpt_tinystories import *

out_dir = "out-polyak-tinystories"
template = "polyak"
