"""The pass contract, passes by name, and passes one after the other."""
