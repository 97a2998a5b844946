"""Layers that stay get new numbers: the configuration of the shallower model, found by comparison with the original."""
