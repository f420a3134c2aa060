"""Tokens that are proposed cheaply and verified by the model, several at once."""
