"""Fine-tuning methods: one file each on the shared base class."""
