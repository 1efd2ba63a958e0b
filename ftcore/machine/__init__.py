"""The machine: devices, SLURM, processes, what a result was made with."""
