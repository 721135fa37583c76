"""Turns a budget into numbers (which chunks, in which form, how many bytes), chooses the budget for `"auto"`, and
predicts bytes and times of every system before anything is stored (`forecast`)."""
