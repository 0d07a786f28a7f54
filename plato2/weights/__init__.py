"""Models in and out: runs and checkpoints of ours, and Knover's parameter names."""
