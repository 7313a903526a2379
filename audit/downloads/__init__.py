"""Ingest: how do the field's official downloads become one table of clips?"""

from .ingest import ADAPTERS, Adapter, Ingested, ingest

__all__ = ["ADAPTERS", "Adapter", "Ingested", "ingest"]
