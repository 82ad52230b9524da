"""Load checkpoints of other projects."""
