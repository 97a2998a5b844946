"""Low-rank methods, one file each."""
