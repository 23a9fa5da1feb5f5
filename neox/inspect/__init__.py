"""Looking into models and runs: what a run writes while it learns, and its curves beside those of others."""
