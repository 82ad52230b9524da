"""Read and write samples in tar shards, local or remote."""
