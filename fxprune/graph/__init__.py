"""An fx graph as this package uses it: its tensors, names and arguments, and what is known about it."""
