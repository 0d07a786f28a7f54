"""Shards to batches, at every step: tokenizer, samples, shards, order, packing, batches."""
