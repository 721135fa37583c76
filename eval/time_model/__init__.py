"""A model of time: what a request does, counted, and how long that takes on a machine of given speeds.

Requests of the library and of its rivals run on *pretended* device memory (`pretend`): the real code, the real shape of
a 7B model, without its weights and without a GPU. What they do is recorded event by event (`recording`, `counting`),
and replayed with the speeds of a machine (`replay`, `machines`). `python -m eval.time_model` prints what comes out;
docs/results/gpu.md says how far to trust it.
"""
