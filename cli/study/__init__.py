"""The command study: its steps, its numbers, the claims that are checked, and its page."""
