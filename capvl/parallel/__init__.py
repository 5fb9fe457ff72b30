"""Meshes, logical axes, processes."""
