"""Convert other layouts of data into shards."""
