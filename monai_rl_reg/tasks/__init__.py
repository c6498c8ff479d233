"""Tasks: the environments that the engine plays in."""
