"""TMMFormer (triple momentum, arXiv 2605.24425) on TinyStories: gpt_tinystories, other template.

Cost:     about gpt_tinystories' (the velocity adds no matrix).
Expected: 1.081 where GPT has 1.114 and YuriiFormer 1.085, in a reproduction's common evaluation.
"""

from config.gpt_tinystories import *

out_dir = "out-tmm-tinystories"
template = "tmm"
