"""What is removed: scores of units, the units that stay, the plan, and the report."""
