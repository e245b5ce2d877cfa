"""fx graphs: tensors, names, arguments, shapes, counts, and the facts about a graph."""
