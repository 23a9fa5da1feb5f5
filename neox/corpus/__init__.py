"""Text to tokens: readers -> shards -> workers -> one .bin/.idx pair with a manifest."""

from neox.corpus.preparation import PrepareReport, prepare
from neox.corpus.readers import read_documents

__all__ = ["PrepareReport", "prepare", "read_documents"]
