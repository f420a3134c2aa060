"""What the report measures: seconds, memory, quality."""
