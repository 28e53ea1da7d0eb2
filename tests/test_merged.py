"""A weight that is merged when somebody reads it is, for everything that hosts do with one, an ordinary tensor."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.ops import layers
from graft.ops.baked import with_loras
from graft.ops.merged import MergedTensor
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

WANTED = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def reads():
    return []


@pytest.fixture
def weight(reads) -> MergedTensor:
    return MergedTensor(lambda: reads.append(1) or WANTED.clone(), (3, 4), torch.zeros(7, dtype=torch.uint8))


def test_what_it_looks_like_costs_nothing(weight, reads) -> None:
    assert weight.shape == (3, 4) and weight.dtype == torch.float32 and weight.is_floating_point()
    assert len(weight) == 3 and weight.ndim == 2 and weight.numel() == 12 and weight.nbytes == 7
    for same in (weight.detach(), weight.data, weight.contiguous(), weight.cpu(), nn.Parameter(weight, False)):
        assert same.nbytes == 7 and same.shape == (3, 4)
    assert "3, 4" in repr(weight)
    assert not reads


@pytest.mark.parametrize("inference", [False, True])
def test_every_reading_merges_once(weight, reads, inference) -> None:
    readings = (
        lambda w: w + 0, lambda w: w.clone(), lambda w: w.to(torch.float64), lambda w: w.to(torch.float32, copy=True),
        lambda w: w[1], lambda w: w[:, 1:3], lambda w: w.reshape(-1), lambda w: w.chunk(3)[0], lambda w: w.t(),
        lambda w: torch.cat([w, torch.ones(1, 4)]), lambda w: torch.zeros(3, 4).copy_(w),
        lambda w: nn.functional.linear(torch.ones(2, 4), w),
    )  # fmt: skip
    for number, read in enumerate(readings, 1):
        with torch.inference_mode(inference):
            got = read(weight)
            assert type(got) is torch.Tensor and torch.equal(got, read(WANTED)), number
        assert len(reads) == number
    assert torch.equal(torch.stack([weight, weight]), torch.stack([WANTED, WANTED]))


def test_a_model_takes_it(weight) -> None:
    for model, assign in ((nn.Linear(4, 3, bias=False), False), (nn.Linear(4, 3, bias=False), True)):
        model.load_state_dict({"weight": weight}, assign=assign)
        assert torch.equal(model(torch.eye(4)).t(), WANTED)
    ours = layers.Linear(4, 3)
    ours.load_state_dict(
        {"weight": weight, "bias": MergedTensor(lambda: torch.ones(3), (3,), torch.zeros(7, dtype=torch.uint8))}
    )
    assert type(ours.weight.data) is type(ours.bias.data) is torch.Tensor
    assert torch.equal(ours(torch.eye(4)).t(), WANTED + 1)


def test_copies_and_files_hold_the_numbers(weight, tmp_path) -> None:
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(copied) is torch.Tensor and torch.equal(copied, WANTED)
    torch.save({"weight": weight}, tmp_path / "file.pt")
    assert torch.equal(torch.load(tmp_path / "file.pt")["weight"], WANTED)
    with pytest.raises(TypeError, match="clone"):
        save_file({"weight": weight}, tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1), lambda w: w.zero_(), lambda w: w.__setitem__(0, 1), lambda w: torch.add(w, w, out=w),
        lambda w: w.copy_(torch.ones(3, 4)),
    ],
)  # fmt: skip
def test_it_is_never_written_to(weight, write) -> None:
    with pytest.raises(TypeError, match="read-only"):
        write(weight)


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations have made and somebody holds.

    Attributes:
        most: that were held at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: (held, size) for key, (held, size) in self._alive.items() if not held.expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


of_older_pythons = pytest.mark.skipif(sys.version_info < (3, 11), reason="a caller holds what it has passed")


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=of_older_pythons)])
def test_loras_are_merged_in_the_memory_of_two_weights(count: int, tmp_path: Path) -> None:
    rows, columns, rank = 512, 256, 2
    factors = {"lora_A.weight": torch.randn(rank, columns), "lora_B.weight": torch.randn(rows, rank)}
    save_file({f"diffusion_model.proj.{name}": w for name, w in factors.items()}, tmp_path / "lora.safetensors")
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    (merged,) = with_loras({"proj.weight": weight}, [(tmp_path / "lora.safetensors", 0.5)] * count).values()
    with Held() as held:
        got = merged.dequantize()
    wanted = weight.float() + count * 0.5 * factors["lora_B.weight"] @ factors["lora_A.weight"]
    torch.testing.assert_close(got, wanted)
    assert held.most == 2 * 4 * rows * columns
