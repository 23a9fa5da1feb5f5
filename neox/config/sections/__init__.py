"""The options, section by section; `neox.config.Config` joins them."""
