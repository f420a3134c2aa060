"""The command line: config files, values that are typed, signals, messages."""
