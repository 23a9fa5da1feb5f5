"""NeoX: train, run, evaluate and study GPT-NeoX language models."""
