"""Products on the CPU: packed codes, by torch's own kernels and by compiled loops."""
