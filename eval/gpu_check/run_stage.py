"""The process of one stage: `python -m eval.gpu_check.run_stage STAGE SETTINGS UNTIL`."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from .results import BrokenDeviceError, Clock, FatalError, Results, said
from .settings import Settings
from .stages import BROKEN, COMPLETE, FAILED, FATAL

_PR_SET_PDEATHSIG = 1
# Each has a function `run(settings, results, clock)`.
MODULES = {
    "where": ".where",
    "tests": ".device_tests",
    "time": ".time_stage",
    "trace": ".traces",
    "table": ".table",
}


def die_with_parent() -> None:
    """Make the system kill this process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(stage: str, saved: str, until: str) -> int:
    """Run a stage; returns the exit code."""
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    settings = Settings.load(Path(saved))
    results = Results(settings.out)
    began = time.time()
    code = COMPLETE
    try:
        module = importlib.import_module(MODULES[stage], __package__)
        results.stage(stage)["start_s"] = results.stage(stage).get("start_s", 0.0) + time.time() - began
        # A fast start does not extend the stage's deadline.
        clock = Clock(min(float(until), time.time() + settings.deadline(stage)))
        module.run(settings, results, clock)
    except FatalError as error:
        code = FATAL
        results.stage(stage)["error"] = str(error)
    except BrokenDeviceError as error:
        code = BROKEN
        results.stage(stage)["error"] = str(error)
    except Exception as error:
        traceback.print_exc()
        code = FAILED
        results.stage(stage)["error"] = said(error)
    results.flush()
    return code


if __name__ == "__main__":
    ended = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Do not wait for threads or a device that may hang; all results are written.
    os._exit(ended)
