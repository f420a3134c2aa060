"""Products, rotary positions, rounded weights."""
