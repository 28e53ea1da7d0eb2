"""The GGUF reader: header, metadata, tensors, and what the file is taken for."""

from __future__ import annotations

import itertools
import math

from graft.kernels import GraftError
from graft.ops.files.gguf import describe, diffusion_tensors, open_gguf
from graft.ops.files.scales import weights_of
from graft.ops.files.shapes import other_ranks, with_leading_ones
from graft.ops.packed import PackedTensor

from .bounds import bounded, sentence, written
from .choices import Choices
from .gguf_files import file as make_file

SUFFIX = ".gguf"


def make(choices: Choices) -> bytes:
    return make_file(choices)


def check(data: bytes) -> None:
    path = written(data, SUFFIX)
    with bounded(len(data)):
        try:
            file = open_gguf(path)
            assert len(describe(file)) < 4000
            for key in file.metadata:
                file.metadata[key]
            for tensor in file.tensors.values():
                assert tensor.offset > 0 and tensor.offset + tensor.nbytes <= len(data)
                assert tensor.data.numel() == tensor.nbytes and math.prod(tensor.shape) == tensor.parameters
                tensor.data.sum()  # reads every byte
            state = weights_of(diffusion_tensors(file), file)
            for other in (state, with_leading_ones(state), *itertools.islice(other_ranks(state), 3)):
                assert all(tensor.numel() == math.prod(tensor.shape) for tensor in other.values())
            for name, weight in state.items():
                if weight.numel() < 10_000 and isinstance(weight, PackedTensor):
                    assert weight.dequantize().shape == weight.shape, name
        except GraftError as error:
            sentence(error)
