"""Looking into tokenizers, runs and models: one module a topic."""
