"""Data sets, transforms, tokenizers and the loader."""
