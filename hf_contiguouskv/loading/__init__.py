"""Brings chunks and keys of one prefix from disk or memory to where attention and selection find them."""
