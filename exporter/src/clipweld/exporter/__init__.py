"""Merge adapters into CLIP, write Triton model repositories, serve and switch their versions."""

__version__ = "0.1.0"
