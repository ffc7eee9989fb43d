"""The small CLIP and its six small tasks, shipped with the package; `trainer.mini.recipe` rebuilds them."""
