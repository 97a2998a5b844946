"""Repairs of a model that lost layers, one file each."""
