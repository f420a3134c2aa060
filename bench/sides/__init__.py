"""What is compared, each in a process of its own."""
