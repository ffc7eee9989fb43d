"""Adapters: the files that learning leaves behind, the folders that they lie in, and merging them."""
