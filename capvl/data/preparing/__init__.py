"""Data sets made from what people have: tars, parquet, annotation files, tfds; filters, Beam, publishing.

Imports reading and what is below it.
"""
