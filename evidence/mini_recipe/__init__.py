"""How the small CLIP and its tasks are made, from packages of public registries (`make mini`)."""
