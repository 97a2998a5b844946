"""Finding codes: the nearest sequence of a trellis, the nearest vector of a lattice, and error feedback between columns."""
