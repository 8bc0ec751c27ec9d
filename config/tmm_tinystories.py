"""TMMFormer (triple momentum, arXiv 2605.24425) on TinyStories: gpt_tinystories, other template.

Cost:     4.9 G tokens, 3.9e18 FLOP; 3.3 h of one H100 (docs/speed.md).
Expected: 1.081 where GPT has 1.114 and YuriiFormer 1.085, in a reproduction's common evaluation.
"""

from config.gpt_tinystories import *

out_dir = "out-tmm-tinystories"
template = "tmm"
