"""How a network learns: data, loop, checkpoints, recipes, evaluation."""
