"""What this library knows about a model: layers, attention, fingerprint, and the internals of transformers it uses."""
