"""The command compare: its design, its trainings as cells, their schedule and their results."""
