"""YuriiFormer (Nesterov + Lie-Trotter) on OpenWebText: gpt_owt with another template.

Cost:     about gpt_owt's (the velocity adds no matrix).
Expected: best validation loss 2.920 in the paper (arXiv 2601.23236), 2.914 in a reproduction.
"""

from config.gpt_owt import *

out_dir = "out-yurii-owt"
template = "nesterov"
