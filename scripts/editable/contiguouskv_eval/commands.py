"""Only for an editable install, where the evaluation package is the folder `eval` of the checkout.

A wheel installs that folder as `contiguouskv_eval`, and the entry points in pyproject.toml name it so. An editable
install puts this folder on the path instead (`dev-mode-dirs`), so that the same entry points lead to `eval`.
"""

from eval.commands import app, bench_app, calibrate_app

__all__ = ["app", "bench_app", "calibrate_app"]
