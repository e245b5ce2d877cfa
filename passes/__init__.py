"""The pass suite: discover, estimate, select, shrink, verify. One pass a file; found by name through entry points."""
