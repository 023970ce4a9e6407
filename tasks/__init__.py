"""The demo tasks' figures; not part of the installed package."""
