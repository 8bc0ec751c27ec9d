"""Study: what the gain is made of at 124 M parameters on real text: one epoch of 91 novels by the
recipe of config/gpt_tinystories.py; gpu_long.py has four. Streams in float32 and in bfloat16.

Fixed beforehand: four seeds, and the margin of anatomy.py.

It goes in pieces of whole runs, which --dry_run estimates for the card at hand: one variant and
seed with --only and --first_seed=3 --seeds=1, say. Only results.json has to travel, to a machine
with the same code and data; --jobs=0 writes the table. A run leaves 2 GB in out_dir, which is
needed no more when it has ended.

Data:     python prepare.py text --name=novels --input=train.txt --val_input=val.txt
          (17.2 M tokens of computationalstylistics/100_english_novels, and three novels, 0.5 M)
Run:      python bench.py compare config/studies/gpu.py --dataset=novels
Cost:     48 runs of 17.2 M tokens, about a minute and a half each on one H100 (computed).
"""

from config.gpt_tinystories import *

study = "gpu"
out_dir = "out-study-gpu"
seeds = 4
margin = 0.012
x = "tokens"
variants = (
    "gd (GPT): template=gd",
    "nesterov (YuriiFormer): template=nesterov",
    "frozen: template=frozen",
    "tmm: template=tmm",
    "normed: template=normed",
    "x0: template=x0",
    "gd, bf16: template=gd stream_dtype=bfloat16",
    "nesterov, bf16: template=nesterov stream_dtype=bfloat16",
    "frozen, bf16: template=frozen stream_dtype=bfloat16",
    "tmm, bf16: template=tmm stream_dtype=bfloat16",
    "normed, bf16: template=normed stream_dtype=bfloat16",
    "x0, bf16: template=x0 stream_dtype=bfloat16",
)
pairs = (
    "frozen - nesterov (YuriiFormer)",
    "frozen - normed",
    "nesterov, bf16 - nesterov (YuriiFormer)",
    "frozen, bf16 - frozen",
    "tmm, bf16 - tmm",
    "normed, bf16 - normed",
    "x0, bf16 - x0",
)

dataset = "novels"
# 16 sequences x 4 micro-batches x 1024 tokens = 65,536 tokens per step
batch_size = 16
gradient_accumulation_steps = 4
max_iters = 262  # one epoch
warmup_iters = 26
eval_interval = 66
eval_tokens = 600_000  # the whole validation split
save_interval = 10_000  # at the end only
