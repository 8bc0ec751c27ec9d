"""What bench.py offers beyond measuring our model: compare and findings (studies), judge (eval),
exchange (export, convert), watch (plot), race (taking turns, and nanoGPT beside us)."""
