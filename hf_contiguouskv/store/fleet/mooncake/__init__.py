"""Mooncake Store as the engine of a fleet: the memory that machines lend each other."""
