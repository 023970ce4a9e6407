"""Compares ways to adapt a base under equal budgets, on a test that is opened when all choices are made."""
