"""What this library knows of a model: its layers, its attention, its fingerprint, and where it meets transformers."""
