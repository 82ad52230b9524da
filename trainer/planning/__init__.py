"""Predict memory, time and communication of a step before it runs."""
