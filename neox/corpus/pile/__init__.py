"""The Pile: its release, components, statistics and datasheet."""
