"""Talking to a trained model: decode K candidates, rank them by coherence, reply."""
