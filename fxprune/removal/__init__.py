"""The decided removal: scores of units, budgets, kept units, and the plan as data."""
