"""Looks into what was made: tokenizers, runs, models. One module a topic."""
