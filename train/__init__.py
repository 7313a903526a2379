"""Fine-tune on what the manifest says, and find out whether it helped."""
