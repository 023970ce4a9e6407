"""A benchmark that others can run: `python -m tasks.bench`."""
