"""What a version must pass: the answers of PyTorch, the accuracy of its tasks, and its own manifest."""
