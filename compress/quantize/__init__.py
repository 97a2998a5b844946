"""Quantizing methods, with and without a low-rank correction, one file each."""
