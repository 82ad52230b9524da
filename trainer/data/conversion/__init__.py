"""Convert data sets in other layouts into samples of shards."""
