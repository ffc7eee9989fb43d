"""The base CLIP: its weights, its layers and its training batches."""
