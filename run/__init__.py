"""Carrying out a plan: the pipeline, its layer loop, and what is measured on the way."""
