"""Measure the speed and memory of the trainer: one module for each subcommand of ``python -m trainer.benchmark``."""
