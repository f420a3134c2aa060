"""Files and folders that we write, and only those."""
