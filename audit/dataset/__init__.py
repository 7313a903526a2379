"""Datasets: samples, labels and modalities of a source."""
