"""What works on finished runs and on data."""
