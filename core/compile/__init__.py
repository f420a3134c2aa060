"""What a compiled program costs: FLOPs, bytes, memory; chips and their networks."""
