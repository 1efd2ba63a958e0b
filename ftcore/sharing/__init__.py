"""Recipes of others: pack, lock, replay, check."""
