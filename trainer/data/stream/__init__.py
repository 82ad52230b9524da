"""Decide which samples make each batch, and deliver the batches."""
