"""One request on an attached prefix: choose chunks, load them, put them in place."""
