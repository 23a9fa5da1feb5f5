"""What lies between the documents of a shard and their tokens: what a plan leaves out, and notes of the rest."""

from __future__ import annotations

from pathlib import Path

from neox.corpus.clean.cleaning import Cleaning
from neox.corpus.pile.components import Components, Read
from neox.corpus.plan import Plan
from neox.corpus.shards import documents


def reader(plan: Plan) -> Read:
    """What reads shards of the plan: all of their documents, or those that the plan's settings leave."""
    read: Read = documents
    if "cleaning" in plan.settings:
        read = Cleaning.again(plan).documents
    if folder := plan.settings.get("components"):
        read = Components(Path(folder), read).documents
    return read
