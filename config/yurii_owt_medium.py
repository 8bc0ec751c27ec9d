"""YuriiFormer medium on OpenWebText: gpt_owt_medium with another template.

Cost:     about gpt_owt_medium's (the velocity adds no matrix).
Expected: best validation loss 2.707 in the paper (arXiv 2601.23236; our reading of its figure).
"""

from config.gpt_owt_medium import *

out_dir = "out-yurii-owt-medium"
template = "nesterov"
