"""What a model has: its lists of blocks, sites and components, found by structure."""
