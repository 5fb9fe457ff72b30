"""Losses that know no model."""
