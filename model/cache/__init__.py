"""Keys and values of earlier tokens: how they are kept, and attention to them."""
