"""The text that the model learns, which every Python carries, and the tokenizer trained on it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.tiny_llama.model import WEIGHTS

END = "<|end|>"


def topics() -> list[str]:
    """The pages of `help("TOPIC")`, in the order of their names."""
    from pydoc_data.topics import topics as pages

    return [pages[name].strip() for name in sorted(pages)]


def train_tokenizer(pages: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: nothing is unknown to it, and decoding gives back the very text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(pages, trainer)
    return tokenizer


def load_tokenizer(folder: Path = WEIGHTS) -> Tokenizer:
    """The tokenizer that the saved model was trained with."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
