"""What a run needs, found without the hardware: memory, time and cost."""
