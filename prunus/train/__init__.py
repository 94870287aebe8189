"""Training: one loop, its recipes, and the checkpoints that it goes on from. It knows no pruning method."""
