"""Test the page of trainer.demo: its logic, its server, and a conversation in a real browser."""
