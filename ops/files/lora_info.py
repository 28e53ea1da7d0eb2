"""What a LoRA file says of itself, read from its header alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...kernels import plain
from ..report import describe, family_of, split_name
from .dialects import dialect_of, from_llama_cpp
from .lora import read_header

_LONGEST = 600
"""Characters of a value: a file may hold megabytes of text."""

_CAPTIONS = 20
"""Words of captions that are told at most."""

# what people ask for, under the names that kohya's scripts, OneTrainer and modelspec have for it
_NOTES = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "description": ("modelspec.description",),
    "how to use": ("modelspec.usage_hint",),
    "license": ("modelspec.license",),
    "base model": ("ss_base_model_version", "modelspec.architecture"),
    "trained on": ("ss_sd_model_name", "ss_base_model_name"),
    "pictures": ("ss_num_train_images",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "learning rate": ("ss_unet_lr", "ss_learning_rate"),
    "optimizer": ("ss_optimizer",),
    "network": ("ss_network_module",),
    "alpha": ("ss_network_alpha",),
    "trainer's comment": ("ss_training_comment",),
    "date": ("modelspec.date",),
}
CAPTIONS = "words in captions"
LABELS = ("kind", "trained for", "names", *_NOTES, CAPTIONS)
"""All that a `LoraInfo` may call its notes."""


class LoraInfo(NamedTuple):
    """What a file says of itself.

    Attributes:
        words: what its trainer called the subject.
        notes: ``(what, value)``, of which `LABELS` are all; texts of the file are cut and of one line.
    """

    words: list[str]
    notes: list[tuple[str, str]]


def lora_info(path: str | os.PathLike[str]) -> LoraInfo:
    """Read what a LoRA file says of itself.

    Raises:
        AdapterError: it is missing, damaged or of another kind.
    """
    state, metadata = read_header(path)
    state = from_llama_cpp(state, None)
    names = dialect_of(key for key in state if split_name(key) is not None)
    ours = [("kind", describe(state)), ("trained for", family_of(state)), ("names", names)]
    notes = [*ours, *_told(metadata), (CAPTIONS, ", ".join(_caption_words(metadata)))]
    shown = ((what, _in_a_line(value)) for what, value in notes)
    words = list(filter(None, map(_in_a_line, trigger_words(metadata))))
    return LoraInfo(words, [(what, value) for what, value in shown if value not in ("", "None", "null")])


def _in_a_line(value: str) -> str:
    return plain(" ".join(value[:_LONGEST].split()))


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What the file says its trainer called the subject; nothing where it has captions alone, of whatever is common."""
    phrase = metadata.get("modelspec.trigger_phrase") or metadata.get("ss_trigger_words") or ""
    return [word.strip() for word in phrase.split(",") if word.strip()]


def _told(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for what, keys in _NOTES.items():
        yield what, next((metadata[key] for key in keys if metadata.get(key) not in (None, "", "None")), "")


def _caption_words(metadata: Mapping[str, str]) -> list[str]:
    """The most frequent ones, with their counts, from kohya's ``{folder: {word: count}}``; nothing if it is another."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency") or "{}")
        counted: Counter[str] = Counter()
        for words in folders.values():
            counted.update({str(word).strip(): int(count) for word, count in words.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return [f"{word[:60]} ({count})" for word, count in counted.most_common(_CAPTIONS)]
