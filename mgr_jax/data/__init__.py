"""Documents in parquet shards, tokenizers, and the stream of batches. Knows nothing of models."""
