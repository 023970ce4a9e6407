"""Steering without training, and what causes what: directions, interchange, subspaces."""
