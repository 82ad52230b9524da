"""Measure each step and record it: metrics.jsonl, the ledger, the console, tensorboard, wandb and profiler traces."""
