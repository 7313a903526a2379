"""The audit report: one self-contained HTML page, its numbers and its figures."""

from .page import write_report

__all__ = ["write_report"]
