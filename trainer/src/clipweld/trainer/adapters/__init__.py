"""Adapters: the files that training writes, the folders that hold them, and merging."""
