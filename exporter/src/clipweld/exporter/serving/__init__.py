"""Triton: found, started, watched, and switched from version to version."""
