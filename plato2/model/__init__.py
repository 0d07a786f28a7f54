"""Tensors only: the shared backbone, its heads, masks and losses. Nothing of data, stages or Lightning."""
