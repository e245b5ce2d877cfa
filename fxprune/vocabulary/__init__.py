"""Vocabularies: rows of the embedding and the head, and tokenizers that write every text without them."""
