"""The sides of each comparison, each in a process of its own."""
