"""Measurements for the report: seconds, memory, quality."""
