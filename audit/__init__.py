"""The audit: per-sample modality balance of a dataset."""
