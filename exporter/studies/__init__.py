"""Measurements of the exporter itself, each a command: what RESULTS.md reports."""
