"""Computes KV exactly, writes it to the store, and recomputes damaged KV."""
