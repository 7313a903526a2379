"""Subsets of a scored dataset, written as manifests."""
