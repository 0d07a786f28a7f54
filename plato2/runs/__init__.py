"""A run: its folder, corpus and start weights, checkpoints, callbacks, loggers, and what it will need."""
