"""The options, section by section: typed, with defaults, each checked in itself. `neox.config` puts them together."""
