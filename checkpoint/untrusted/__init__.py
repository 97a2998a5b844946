"""Guards at files that anyone may have written: kind, size and content are bounded before they are used."""
