"""Inside the processes of a run: prepare, fit, callbacks, checkpoints, loggers."""
