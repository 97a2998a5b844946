"""Measuring a model: perplexity, and tasks of lm-eval."""
