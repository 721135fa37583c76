"""Small numbers on their way to an accelerator and back. On a CPU nothing moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.hardware import accelerator as devices


def send(numbers: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A tensor of `numbers` on `device`, in pinned memory on its way there: the host waits for nothing."""
    opened = devices.device_of(device)
    tensor = torch.from_numpy(numbers)
    return tensor if opened is None else opened.send(tensor)


def fetch(values: torch.Tensor, device: torch.device) -> npt.NDArray[Any]:
    """What was computed on `device`. The host waits for it: only for what names the next reads."""
    opened = devices.device_of(device)
    found: npt.NDArray[Any] = (values if opened is None else opened.fetch(values)).numpy()
    return found
