"""Commands that look at a model or at this machine and change nothing."""
