"""The value of each idea: variants of selection and precision, compared on the same computed prefixes.

Nothing is stored or read here. A prefix is computed once. Every variant answers in one forward that sees only the
chunks that the variant would have selected, rounded as they would have been stored. So hundreds of requests in dozens
of variants take minutes, and only the idea causes differences. `python -m eval run` measures the cost in time.
"""
