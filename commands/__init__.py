"""The commands, and what the terminal shows."""
