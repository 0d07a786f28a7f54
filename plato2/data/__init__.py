"""Text in, batches out: corpora, cleaning, tokenizer, samples, shards, order, packing, batches."""
