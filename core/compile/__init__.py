"""The cost of compiled programs: FLOPs, bytes, memory; chips and their networks."""
