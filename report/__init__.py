"""A finished result as one page to look at, and as numbers to read by program."""
