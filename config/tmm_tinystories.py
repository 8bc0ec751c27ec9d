"""TMMFormer (triple momentum) on TinyStories: gpt_tinystories with another template.

Cost:     about gpt_tinystories' (the velocity adds no matrix).
Expected: 1.081 where GPT has 1.114 and YuriiFormer 1.085, in a reproduction's common evaluation
          (arXiv 2605.24425).
"""

from config.gpt_tinystories import *

out_dir = "out-tmm-tinystories"
template = "tmm"
