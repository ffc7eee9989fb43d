"""The CLIP that everything starts from: its weights, its layers, and the batches that it is given."""
