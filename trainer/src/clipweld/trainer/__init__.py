"""Learn image domains one after another, each as a small adapter that merges into CLIP's own weights."""

__version__ = "0.1.0"
