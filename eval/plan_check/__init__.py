"""How far the times of `contiguouskv plan` are from measured ones, and what it says of the paper's hardware."""
