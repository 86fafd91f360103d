"""Rows without padding, in which every token is computed once."""
