"""Feature vectors of modalities, encoded once and cached."""
