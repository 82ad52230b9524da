"""The only room that drives DeepSpeed."""
