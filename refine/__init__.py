"""Training after compression: single layers, or the whole model end to end."""
