"""Which eviction policy keeps the right chunks: a trace of real selections, replayed through the real store."""
