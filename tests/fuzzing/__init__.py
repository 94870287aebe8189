"""Hostile inputs: valid specimens, changed by a seed, given to what reads them in a process that is watched."""
