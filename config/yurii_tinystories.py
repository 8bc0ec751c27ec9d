"""YuriiFormer (Nesterov + Lie-Trotter) on TinyStories: gpt_tinystories with another template.

Cost:     about gpt_tinystories' (the velocity adds no matrix); 5 h on one H200 in a reproduction.
Expected: best validation loss 1.078 in the paper (arXiv 2601.23236).
"""

from config.gpt_tinystories import *

out_dir = "out-yurii-tinystories"
template = "nesterov"
