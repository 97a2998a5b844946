"""Dictionary methods, one file each."""
