"""The systems that are measured, one file each, all on the same reader, layout and threads."""
