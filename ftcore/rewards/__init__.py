"""Reward functions and the worker process that runs them; no torch."""
