"""Measurements of the trainer itself, each a command: what RESULTS.md reports."""
