"""Turns a budget into numbers (which chunks, in which form, how many bytes), and chooses the budget for `"auto"`."""
