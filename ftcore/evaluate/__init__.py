"""Base model against tuned model on held-out rows."""
