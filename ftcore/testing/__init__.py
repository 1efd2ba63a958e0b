"""Tools to test a run, and the machines it runs on, against what goes wrong."""
