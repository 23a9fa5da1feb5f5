"""The decoder and its cache; parameter counts and muP need no torch."""

IGNORED = -100
"""The label of a position that takes no part in the loss (torch's cross_entropy leaves it out by default)."""
