"""Bytes in, sound, pictures and frames out"""
