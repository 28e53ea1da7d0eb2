"""From a model's weights to a GGUF file of any type: what becomes what, how large that is, and the writing.

Weights come as a state dict of ordinary, packed and merged tensors (`PackedTensor`, `MergedTensor`). Each is read when
it is its turn, quantized in runs of rows and forgotten, so that memory holds about one layer in fp32.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..kernels import GraftError, UnsupportedFormat, plain
from .files.architectures import KNOWN_TO_PEERS
from .files.writer import NewTensor, Value, write_gguf
from .merged import MergedTensor
from .packed import PackedTensor, in_fp32
from .quantize import quantize
from .recipes import READ_BY_PEERS, SAME, Choice, Chooser, Recipe, Rule
from .report import examples, layers, size_text

_WEIGHTS_AT_A_TIME = 1 << 20
"""As many are quantized between two looks at whether to stop: half a second of the slowest types."""
_BYTES_AT_A_TIME = 1 << 26
_LONGEST_NAME = 127  # ggml's, as ComfyUI-GGUF and stable-diffusion.cpp build it
_QUANT_VERSION = 2
_LONGEST_PART = 300  # characters of what a file says of itself
_SKIPPED = re.compile(
    r"_extra_state$|^accum_|\.accum_|num_batches_tracked$|position_ids$|^(?:v_pred|ztsnr|scaled_fp8)$"
)
"""What is no weight."""
_SCALED = re.compile(
    r"(?:scale_weight|weight_scale(?:_\w+)?|comfy_quant|weight\.(?:absmax|quant_map|nested_absmax|quant_state\.\w+)|"
    r"qweight|qzeros|SCB|smooth_factor\w*|wscales)$"
)
"""Beside weights in fp8, NF4 and such, which stand for something else than they hold."""
_FP8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))
VERSION = re.findall(
    r'^version = "([^"]+)"', (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
)[0]
"""Graft's."""

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

Importance = Mapping[str, torch.Tensor]
"""By a tensor's name in the file, the mean square of what each column is multiplied with, fp32 ``[columns]``."""


@dataclass(frozen=True)
class Plan:
    """What a model becomes, before anything is written.

    Attributes:
        architecture: ``general.architecture``.
        recipe: None for the types that the tensors have.
        choices: by name.
        skipped: tensors that are no weights.
    """

    architecture: str
    recipe: Recipe | None
    choices: dict[str, Choice]
    state: Mapping[str, torch.Tensor] = field(repr=False)
    importance: Importance | None = field(default=None, repr=False)
    skipped: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(NewTensor(name, fmt, shape, tuple).nbytes for name, (fmt, shape, _) in self.choices.items())

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(self.state[name].numel() for name in self.choices)

    @property
    def summary(self) -> str:
        """``flux · Q4_K_M · 11.9B weights · Q4_K 228, Q6_K 76, F32 471 · 6.87 GB``."""
        counts = Counter(fmt.name for fmt, _, _ in self.choices.values())
        types = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        weights = f"{self.weights / 1e9:.1f}B" if self.weights >= 1e9 else f"{self.weights / 1e6:.1f}M"
        return f"{self.architecture} · {self.recipe_name} · {weights} weights · {types} · {size_text(self.nbytes)}"

    @property
    def recipe_name(self) -> str:
        return SAME if self.recipe is None else self.recipe.name

    @property
    def notes(self) -> list[str]:
        """What a person should know about it, a sentence each."""
        notes = []
        for why in dict.fromkeys(choice.why for choice in self.choices.values() if choice.why):
            names = [f"{name} ({c.fmt})" for name, c in self.choices.items() if c.why == why]
            notes.append(f"{layers(len(names))} in another type, {why}: {examples(names)}")
        again = self._requantized()
        if again:
            notes.append(
                f"{layers(len(again))} were quantized before and are quantized again, which loses more than starting "
                f"from the full model: {examples(again)}"
            )
        fp8 = [name for name in self.choices if self.state[name].dtype in _FP8]
        if fp8:
            notes.append(f"{layers(len(fp8))} of the model are in fp8: what fp8 has lost cannot come back")
        unmeasured = [n for n, c in self.choices.items() if c.fmt.is_quantized and not self.has_importance(n)]
        if self.importance is not None and unmeasured:
            notes.append(f"the importance matrix has no data for {layers(len(unmeasured))}: {examples(unmeasured)}")
        if self.architecture not in (*KNOWN_TO_PEERS, *READ_BY_PEERS):
            notes.append(f"Graft reads this file; ComfyUI-GGUF does not know the architecture {self.architecture}")
        long = [name for name in self.choices if len(name) > _LONGEST_NAME]
        if long:
            notes.append(f"stable-diffusion.cpp cannot read names of over {_LONGEST_NAME} characters: {examples(long)}")
        return notes

    def has_importance(self, name: str) -> bool:
        """Whether the importance of a tensor's columns is known."""
        tensor = self.state[name]
        if self.importance is None or name not in self.importance or tuple(tensor.shape) != self.choices[name].shape:
            return False
        return _fits(self.importance[name], tensor)

    def _requantized(self) -> list[str]:
        return [
            name for name, choice in self.choices.items()
            if choice.fmt.is_quantized and _was_quantized(self.state[name])
            and not _is_kept_as_it_is(self.state[name], choice)
        ]  # fmt: skip


def plan_model(
    state: Mapping[str, torch.Tensor],
    recipe: Recipe | None,
    architecture: str,
    rules: Sequence[Rule] = (),
    importance: Importance | None = None,
) -> Plan:
    """Decide what each tensor of a model becomes.

    Raises:
        UnsupportedFormat: a type cannot be written here, or the weights are in a form that is not read.
    """
    check_weights(state)
    known = None if importance is None else {n for n in importance if n in state and _fits(importance[n], state[n])}
    chooser = Chooser(recipe, architecture, rules, known)
    skipped = [name for name, tensor in state.items() if _SKIPPED.search(name) or not tensor.numel()]
    choices = {name: chooser.choose(name, tensor) for name, tensor in state.items() if name not in set(skipped)}
    if not choices:
        raise UnsupportedFormat("there is no weight to write: connect a model")
    return Plan(architecture, recipe, choices, state, importance, tuple(skipped))


def _fits(importance: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether it says something of the tensor's columns; of a layer that was given zeros alone it says nothing."""
    return importance.shape == tensor.shape[-1:] and bool(importance.any())


def check_weights(state: Mapping[str, torch.Tensor]) -> None:
    """Raises:
    UnsupportedFormat: weights do not hold what they stand for, as in scaled fp8, NF4 and the like.
    """
    scaled = [name for name in state if _SCALED.search(name) and not _SKIPPED.search(name)]
    odd = [
        name for name, tensor in state.items()
        if not tensor.is_floating_point() and name.endswith("weight") and tensor.dim() > 1
    ]  # fmt: skip
    if scaled or odd:
        raise UnsupportedFormat(
            f"the weights are in a quantized format that cannot be saved as GGUF ({examples(scaled or odd)}): load the "
            "model in bf16 or fp16, or as GGUF"
        )


def write_model(
    path: str | os.PathLike[str],
    plan: Plan,
    metadata: Mapping[str, Value] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the file that a plan says.

    Args:
        metadata: further entries, such as what the model was made from (`provenance`).
        progress: told the number of weights that are done since it was told last; what it raises ends the writing.

    Returns:
        the file's size in bytes.

    Raises:
        GraftError: it cannot be written, or a weight cannot be; there is no file then.
    """
    entries = _described(plan) | dict(metadata or {})
    tensors = []
    for name, choice in plan.choices.items():
        if choice.shape != tuple(plan.state[name].shape) and plan.state[name].dim():
            entries[_ORIGINAL_SHAPE + name] = list(plan.state[name].shape)
        importance = plan.importance[name] if plan.importance is not None and plan.has_importance(name) else None
        data = partial(_encoded, name, plan.state[name], choice, importance, progress or (lambda count: None))
        tensors.append(NewTensor(name, choice.fmt, choice.shape, data))
    return write_gguf(path, entries, tensors, overwrite)


def _described(plan: Plan) -> dict[str, Value]:
    number = None if plan.recipe is None else plan.recipe.number
    return {
        "general.architecture": plan.architecture,
        "general.quantization_version": _QUANT_VERSION,
        **({} if number is None else {"general.file_type": number}),
        "graft.recipe": plan.recipe_name,
    }


def _encoded(
    name: str, tensor: torch.Tensor, choice: Choice, importance: torch.Tensor | None, progress: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    """A tensor's bytes in the file, in pieces."""
    try:
        if _is_kept_as_it_is(tensor, choice):
            yield from _pieces(_bytes_of(tensor), tensor.numel(), progress)
            return
        for rows in _rows(tensor, choice.shape):
            yield quantize(rows, choice.fmt, importance)
            progress(rows.numel())
    except GraftError as error:
        raise type(error)(f"{name}: {error}") from error


def _is_kept_as_it_is(tensor: torch.Tensor, choice: Choice) -> bool:
    """Whether a tensor's bytes are those of the file."""
    if isinstance(tensor, PackedTensor):
        return tensor.fmt == choice.fmt and tensor.scale is None
    return not isinstance(tensor, MergedTensor) and tensor.dtype == choice.fmt.dtype


def _was_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or what it is merged from, is packed."""
    return isinstance(tensor.source if isinstance(tensor, MergedTensor) else tensor, PackedTensor)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, PackedTensor):
        return tensor.packed.cpu()
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _pieces(data: torch.Tensor, weights: int, progress: Callable[[int], None]) -> Iterator[torch.Tensor]:
    pieces = data.split(_BYTES_AT_A_TIME)
    for number, piece in enumerate(pieces):
        yield piece
        progress(weights * (number + 1) // len(pieces) - weights * number // len(pieces))


def _rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """A tensor's numbers in fp32 on the CPU, as runs of rows of the `shape` in which it is stored."""
    tensor = tensor.detach()
    whole = isinstance(tensor, PackedTensor) and tensor.rows_are_whole and tuple(tensor.shape) == shape
    if isinstance(tensor, (PackedTensor, MergedTensor)) and not whole:
        tensor = in_fp32(tensor)
    if not isinstance(tensor, PackedTensor):
        tensor = tensor.reshape(-1, shape[-1])
    per_row = tensor.numel() // tensor.shape[0]
    count = max(1, _WEIGHTS_AT_A_TIME // per_row)
    for start in range(0, tensor.shape[0], count):
        yield in_fp32(tensor[start : start + count]).cpu().reshape(-1, shape[-1])


def provenance(
    version: str, source: str, sha256: str = "", loras: Sequence[tuple[str, float]] = (), rules: Sequence[Rule] = (),
    importance: str = "", passed_on: Mapping[str, Value] | None = None,
) -> dict[str, Value]:  # fmt: skip
    """What a file says of how it was made.

    Args:
        version: Graft's.
        source: the name of what it was made from.
        sha256: that file's hash, where it is known.
        loras: what is merged in, with strengths.
        importance: what the importance matrix is.
        passed_on: what the source says of itself (`notes_of`).
    """
    entries: dict[str, Value] = {
        **(passed_on or {}), "general.quantized_by": f"Graft {version}", "graft.version": version,
        "graft.source": source, "graft.source.sha256": sha256, "graft.importance": importance,
        "graft.loras": [f"{name} ×{strength:g}" for name, strength in loras],
        "graft.rules": [f"{rule.pattern} = {rule.type}" for rule in rules],
    }  # fmt: skip
    return {key: value for key, value in entries.items() if value not in ("", [])}


def origin_of(metadata: Mapping[str, object]) -> str:
    """What a file says of how Graft made it, in a line; "" of others."""
    if not isinstance(metadata.get("graft.recipe"), str):
        return ""
    parts = [f"made by Graft: {metadata['graft.recipe']}"]
    for key, text in (("graft.source", "of"), ("graft.loras", "with"), ("graft.rules", "rules")):
        value = metadata.get(key)
        if value:
            parts.append(f"{text} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if metadata.get("graft.importance"):
        parts.append("with an importance matrix")
    return plain(" · ".join(part if len(part) <= _LONGEST_PART else f"{part[:_LONGEST_PART]}…" for part in parts))


def sha256_of(path: str | os.PathLike[str], progress: Callable[[], None] = lambda: None) -> str:
    """A file's hash; `progress` is called now and then, and what it raises ends it."""
    digest = hashlib.sha256()
    with open(Path(path), "rb") as file:
        while piece := file.read(_BYTES_AT_A_TIME):
            digest.update(piece)
            progress()
    return digest.hexdigest()


__all__ = [
    "VERSION", "Importance", "Plan", "check_weights", "origin_of", "plan_model", "provenance", "sha256_of",
    "write_model",
]  # fmt: skip
