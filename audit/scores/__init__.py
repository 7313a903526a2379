"""Scores of samples, and the mixture of the modality gap."""
