"""Rows to batches: collators, data files and data sets."""
