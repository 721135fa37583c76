"""Accelerators and host memory: streams, events, pinned and page-aligned buffers."""
