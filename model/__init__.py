"""The model: its layers, targets and sub-layers, found by watching a forward; edits; precision."""
