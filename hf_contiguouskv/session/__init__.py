"""What a cache is doing: its prefix, its suffix, the running request, and the calls that it is given to."""
