"""Weights in and out: other frameworks' names and layouts."""
