"""Carrying out a plan: the pipeline, its loop over the layers, and the measurements in between."""
