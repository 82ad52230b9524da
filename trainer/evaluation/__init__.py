"""Score a trained model on held-out samples."""
