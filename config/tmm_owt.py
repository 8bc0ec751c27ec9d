"""TMMFormer (triple momentum, arXiv 2605.24425) on OpenWebText: gpt_owt with another template.

Cost:     about gpt_owt's (the velocity adds no matrix).
Expected: best validation loss 2.908 in a reproduction.
"""

from config.gpt_owt import *

out_dir = "out-tmm-owt"
template = "tmm"
