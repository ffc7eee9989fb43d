"""The ONNX graphs of a version: traced, written, and changed to a lower precision."""
