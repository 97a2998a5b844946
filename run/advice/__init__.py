"""Which recipes reach a size, and what they would lose: measured on a sample of layers, before hours are spent."""
