"""What bench.py does with checkpoints and runs, one file for each: judge (eval), exchange (export,
convert), watch (plot); options has them all."""
