"""Computes KV exactly, writes it to the store, and computes again what proved damaged."""
