"""Networks written from scratch in the ways that people write them, with odd sizes that do not match by chance."""
