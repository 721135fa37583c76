"""Accelerators and memory: streams, events, pinned and page-aligned buffers."""
