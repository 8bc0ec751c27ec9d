"""Heavy-ball YuriiFormer on TinyStories: gpt_tinystories with another template.

Cost:     about gpt_tinystories' (the velocity adds no matrix).
Expected: best validation loss 1.083 in the paper (arXiv 2601.23236).
"""

from config.gpt_tinystories import *

out_dir = "out-polyak-tinystories"
template = "polyak"
