"""Find and read the bytes of samples in tar shards, local or remote."""
