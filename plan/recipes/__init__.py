"""What is said of recipes before any model: whether they name an amount, what they need, and a new one to start from."""
