"""Local files of text: decompressed, checked, and read a piece or a row at a time."""
