"""Which idea is worth what: variants of selection and precision, compared on the same computed prefixes.

Nothing is stored or read here. A prefix is computed once, and every variant answers in one forward that sees only
what the variant would have selected, rounded as it would have been stored. So hundreds of requests in dozens of
variants take minutes, and differences are those of the idea. What it costs in time, `python -m eval run` measures.
"""
