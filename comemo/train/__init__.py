"""Training: the recipe of three stages, from JSON lines to a checkpoint."""
