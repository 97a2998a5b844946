"""What a plan asks of the machine: disk, and whether disk and memory will do."""
