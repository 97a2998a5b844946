"""Importance scores of layers and sub-layers, one file each."""
