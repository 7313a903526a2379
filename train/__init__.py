"""Fine-tuning on manifests."""
