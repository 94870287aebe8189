"""Checkpoints in the forms that engines serve."""
