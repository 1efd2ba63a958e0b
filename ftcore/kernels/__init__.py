"""What makes tensors faster and changes no result."""
