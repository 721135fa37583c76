"""Requests of a machine that reads a prefix over a network: a real object server behind a link of any speed."""
