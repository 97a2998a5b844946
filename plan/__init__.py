"""What will happen: the recipe, the budget, and the plan."""
