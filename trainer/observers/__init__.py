"""Observe the steps of a run: what the training loop tells, and who listens."""
