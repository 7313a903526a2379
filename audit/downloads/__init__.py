"""Adapters that read the official downloads of datasets into one table of clips."""

from .ingest import ADAPTERS, Adapter, Ingested, ingest

__all__ = ["ADAPTERS", "Adapter", "Ingested", "ingest"]
