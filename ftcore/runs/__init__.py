"""Around the processes of a run: start, launch, stages."""
