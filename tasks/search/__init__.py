"""Finds where and how to adapt a base, within a budget, on dev alone."""
