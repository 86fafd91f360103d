"""Gradient regularisation (GR, arXiv 2602.18037): two passes, their optimizer steps, and what they are made of."""
