"""The report as tables, pictures and pages."""
