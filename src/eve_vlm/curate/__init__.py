"""Makes a pre-training set: reads, filters, spreads, recaptions and shards pictures by millions."""
