"""Trains under faults made on purpose and checks that nothing is lost: python -m capvl.chaos."""
