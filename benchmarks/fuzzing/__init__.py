"""Generators of damaged and hostile inputs, and the forked children that run mmaudit on them."""
