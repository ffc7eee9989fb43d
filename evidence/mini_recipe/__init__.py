"""The recipe that makes the small CLIP and its tasks from packages of public registries (`make mini`)."""
