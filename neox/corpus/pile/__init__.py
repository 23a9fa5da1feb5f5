"""Preparation of the Pile: its release, components, statistics and datasheet."""
