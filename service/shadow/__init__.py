"""Copies of requests, scored by the challenger in a process that runs when nothing else does."""
