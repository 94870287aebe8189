"""Pruning inside training: the model is cut while it learns."""
