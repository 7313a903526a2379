"""Scoring by shard: the plan of parts, the stages, and the executors that run them."""
