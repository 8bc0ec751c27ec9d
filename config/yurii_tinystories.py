"""YuriiFormer (Nesterov + Lie-Trotter) on TinyStories: gpt_tinystories with another template.

Cost:     4.9 G tokens, 3.9e18 FLOP; 3.2 h of one H100 (docs/speed.md); 5 h on one H200
          in a reproduction.
Expected: best validation loss 1.078 in the paper (arXiv 2601.23236).
"""

from config.gpt_tinystories import *

out_dir = "out-yurii-tinystories"
template = "nesterov"
