"""How a stage is trained: optimizer, checkpoints, callbacks, parallel strategies, what a run needs."""
