"""Towers and their joins."""
