"""From a budget to numbers: which chunks, in which form, how many bytes; and the budget that hides its reads."""
