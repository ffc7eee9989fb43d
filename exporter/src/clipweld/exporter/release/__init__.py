"""Merging adapters into the next version, or into weights for other libraries."""
