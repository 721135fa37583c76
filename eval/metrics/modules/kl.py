"""Mean Kullback-Leibler divergence of the predictions' distributions from the references', in nats."""

from __future__ import annotations

from eval.metrics import base, fidelity


class KL(base.MeanOfLogits):
    """Mean Kullback-Leibler divergence of the predictions' distributions from the references', in nats."""

    of_positions = staticmethod(fidelity.divergence)
