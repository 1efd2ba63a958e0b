"""From overrides to a checked config."""
