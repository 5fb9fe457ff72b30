"""Procedural scenes: the embedded data set. Every fact about an image is known exactly. Imports text and images."""
