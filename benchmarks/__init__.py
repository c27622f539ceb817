"""Measurements: one module a question, each a command of its own, results as JSON in `results/`."""
