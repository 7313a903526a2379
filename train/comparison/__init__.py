"""Comparison of methods over seeds: tables, verdicts, and figures for a column of a paper."""
