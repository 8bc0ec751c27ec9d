"""Study: gpu.py with four times the steps: four epochs, a warm-up of the same share of them.

Data:     as gpu.py
Run:      python bench.py compare config/studies/gpu_long.py --dataset=novels
Cost:     48 runs of 68.7 M tokens, about four minutes each on one H100 (computed); first of gd,
          nesterov and frozen, the streams in float32.
"""

from config.studies.gpu import *

study = "gpu_long"
out_dir = "out-study-gpu-long"
max_iters = 1048  # four epochs
warmup_iters = 104
eval_interval = 131
