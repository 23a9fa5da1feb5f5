"""The decoder and its cache; parameter counts and muP need no torch."""
