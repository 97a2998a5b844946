"""What the commands share: options, checks of arguments, and what the terminal shows."""
