"""The state of a cache across calls: its prefix, its suffix, and the running request."""
