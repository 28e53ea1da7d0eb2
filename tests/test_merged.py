"""A weight that is merged when somebody reads it is, for everything that hosts do with one, an ordinary tensor."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from graft.ops import layers
from graft.ops.merged import MergedTensor
from safetensors.torch import save_file
from torch import nn

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
