"""Text to shards, once for each corpus: readers, cleaning, data cards."""
