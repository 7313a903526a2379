"""Ingest: how do the field's official downloads become one table of clips?"""

from .adapters import ADAPTERS, Adapter
from .ingested import Ingested, ingest

__all__ = ["ADAPTERS", "Adapter", "Ingested", "ingest"]
