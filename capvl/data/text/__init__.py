"""Texts: tokenizers, their training, cleaning, frequencies of n-grams. Of the data it imports `randomness` alone."""
