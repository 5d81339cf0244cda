"""Training: data, loop, checkpoints, recipes, evaluation."""
