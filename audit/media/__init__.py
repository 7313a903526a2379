"""Decoding of sound, images and video."""
