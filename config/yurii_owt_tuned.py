"""YuriiFormer on OpenWebText with a stronger recipe: yurii_owt with Muon weight decay 0.1, a
40-step warm-up and a WSD schedule. In a reproduction the first two took a plain GPT on TinyStories
from 1.053 to 1.044, more than the architecture's own gain.

Cost:     14.7 G tokens, 1.2e19 FLOP; 9.7 h of one H100 (docs/speed.md).
Expected: not measured.
"""

from config.yurii_owt import *

out_dir = "out-yurii-owt-tuned"
muon_weight_decay = 0.1
warmup_iters = 40
schedule = "wsd"
