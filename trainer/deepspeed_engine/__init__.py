"""Drive DeepSpeed; no other room does."""
