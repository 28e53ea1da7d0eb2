"""Shapes that files tell differently, and whether a file brought all of its model."""

from __future__ import annotations

import oracle
import pytest
import torch
from graft.kernels import by_name
from graft.ops import layers
from graft.ops.files.completeness import missing_parts, missing_within, stray_block
from graft.ops.files.shapes import (
    Mismatch,
    fitted,
    mismatches,
    other_ranks,
    refitted,
    with_leading_ones,
)  # fmt: skip
from graft.ops.packed import PackedTensor
from torch import nn

Q8_0 = by_name("Q8_0")


def packed(*shape):
    return PackedTensor(oracle.random_blocks(Q8_0, torch.Size(shape).numel() // 32), Q8_0, shape)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((6, 64), (1, 6, 64)), ((64,), (1, 64)), ((64, 32, 1, 1), (64, 32)), ((64, 32), (64, 32, 1, 1)), ((1, 64), (64,))],
)
@pytest.mark.parametrize("make", [packed, torch.zeros])
def test_ones_are_put_back_and_taken_off(make, shape, wanted):
    tensor = make(*shape)
    got = fitted(tensor, wanted)
    assert got.shape == wanted and type(got) is type(tensor)
    assert torch.equal(got.to(torch.float32).flatten(), tensor.to(torch.float32).flatten())


@pytest.mark.parametrize("wanted", [(64, 6), (2, 3, 64), (6, 64, 2), (384,)])
def test_other_shapes_are_other_shapes(wanted):
    tensor = packed(6, 64)
    assert fitted(tensor, wanted) is tensor


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Linear(64, 12), (12, 64, 1, 1)),
        (lambda: layers.Conv2d(64, 12, 1), (12, 64)),
        (lambda: layers.Conv1d(64, 12, 1), (12, 64, 1, 1)),
        (lambda: layers.Linear(64, 1), (64,)),
    ],
)
def test_a_layer_takes_its_weight_with_more_ones_or_fewer(layer, shape):
    layer, weight = layer(), packed(*shape)
    layer.load_state_dict({"weight": weight, "bias": torch.ones(1, *layer.bias.shape)})
    assert torch.equal(layer.dequantized().flatten(), weight.dequantize(torch.float32).flatten())
    assert layer.weight.data_ptr() == weight.packed.data_ptr() and layer.bias.shape == (layer.logical_shape[0],)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.pad, self.scalar = nn.Parameter(torch.zeros(1, 64)), nn.Parameter(torch.zeros(()))
        self.proj, self.norm = layers.Linear(64, 3), nn.LayerNorm(64)


STATE = {
    "pad": torch.arange(64.0), "scalar": torch.ones(2), "proj.weight": torch.zeros(3, 65), "proj.bias": torch.zeros(3),
    "norm.weight": torch.ones(63), "norm.bias": torch.ones(64),
}  # fmt: skip


def complaint(state):
    with pytest.raises(RuntimeError) as caught:
        Model().load_state_dict(state)
    return mismatches(caught.value)


def _takes_the_first_number() -> bool:
    """Whether this torch loads a row into a scalar, as torch did up to 2.9 at least."""
    scalar = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(()))])
    try:
        scalar.load_state_dict({"0": torch.ones(2)})
    except RuntimeError:
        return False
    return True


def test_what_load_state_dict_complains_about_is_read():
    """torch's own words, of every rank, and those of our layers."""
    assert complaint(STATE) == [
        Mismatch("pad", (64,), (1, 64)),
        *([] if _takes_the_first_number() else [Mismatch("scalar", (2,), ())]),
        Mismatch("proj.weight", (3, 65), (3, 64)),
        Mismatch("norm.weight", (63,), (64,)),
    ]
    assert str(complaint(STATE)[0]) == "pad is [64] and not [1, 64]"
    assert mismatches(RuntimeError("CUDA error: an illegal memory access")) == []
    assert mismatches(KeyError("size mismatch for a: [1] [2]")) == []


def test_parameters_are_put_into_the_models_shapes():
    state = STATE | {"scalar": torch.ones(()), "proj.weight": torch.zeros(3, 64), "norm.weight": torch.ones(64)}
    model, fixed = Model(), refitted(state, complaint(state))
    assert fixed is not None
    model.load_state_dict(fixed)
    assert torch.equal(model.pad.data, state["pad"][None])
    assert refitted(STATE, complaint(STATE)) is None, "there is more wrong than ones"
    assert refitted({}, [Mismatch("pad", (64,), (1, 64))]) is None, "the host has renamed it"
    renamed = refitted({"core.pad": state["pad"], "notepad": state["pad"]}, [Mismatch("pad", (64,), (1, 64))])
    assert renamed is not None and renamed["core.pad"].shape == (1, 64) and renamed["notepad"].shape == (64,)
    assert refitted({"a.pad": state["pad"], "b.pad": state["pad"]}, [Mismatch("pad", (64,), (1, 64))]) is None
    assert refitted(state, []) is None


def test_what_hosts_look_at_before_there_is_a_model():
    state = {"txtfusion.projector.weight": torch.arange(12.0), "pos_embed": packed(4, 64), "other": torch.zeros(12)}
    put_back = with_leading_ones(state)
    assert {name: tuple(t.shape) for name, t in put_back.items()} == {
        "txtfusion.projector.weight": (1, 12), "pos_embed": (1, 4, 64), "other": (12,),
    }  # fmt: skip
    assert isinstance(put_back["pos_embed"], PackedTensor)
    assert all(again is put_back[name] for name, again in with_leading_ones(put_back).items())


def test_ones_behind_are_tried_both_ways():
    linear = {"a.proj_in.weight": packed(64, 64), "b.weight": torch.zeros(3, 4, 3, 3)}
    convolution = {**linear, "a.proj_in.weight": packed(64, 64, 1, 1)}
    for state, other in ((linear, convolution), (convolution, linear)):
        (guess,) = other_ranks(state)
        assert {name: t.shape for name, t in guess.items()} == {name: t.shape for name, t in other.items()}
    assert list(other_ranks({"b.weight": torch.zeros(3, 4, 3, 3), "c.weight": torch.zeros(3, 4)})) == []


HELD = ["img_in.weight", "final.0.weight", "blocks.1.q.weight"]
HELD += [f"blocks.0.{name}" for name in ("q.weight", "q.bias", "norm.scale")]
LAYERS = ["img_in", "blocks.0.q", "blocks.1.q", "blocks.1.k", "final.0", "final.2", "extra.proj", "extra.norm"]


@pytest.mark.parametrize(
    ("missing", "needed"),
    [
        (["blocks.1.q.bias"], ["blocks.1.q.bias"]),
        (["blocks.1.norm.scale"], ["blocks.1.norm.scale"]),
        (["blocks.1.k.weight"], ["blocks.1.k.weight"]),
        (["final.2.weight", "final.2.bias"], ["final.2.weight"]),
        (["blocks.1.gate"], []),
        (["extra.proj.weight", "extra.norm.weight"], []),
    ],
    ids=["sibling", "sibling of the host's", "layer", "layer of two", "the host's own", "a part"],
)
def test_what_a_model_cannot_do_without(missing, needed):
    assert missing_within(missing, HELD, LAYERS) == needed


def test_parts_that_a_file_has_nothing_of_are_told():
    missing = ["extra.proj.weight", "extra.norm.weight", "extra.table", "blocks.1.k.weight", "tokens"]
    assert missing_parts(missing, HELD, LAYERS) == ["extra"]
    assert missing_parts([], HELD, LAYERS) == []


@pytest.mark.parametrize(
    ("unexpected", "found"),
    [
        (["pooler.weight", "blocks.3.q.weight", "blocks.4.q.weight"], ("blocks.3", "blocks.2")),
        (["blocks.2.q.weight"], ("blocks.2", None)),
        (["blocks.1.q.weight.scale"], None),
        (["final.0.bias"], None),
        (["pooler.weight", "text.0.q.weight"], None),
    ],
    ids=["a gap", "more blocks", "something beside", "a bias that is not the model's", "another model"],
)
def test_blocks_behind_the_end_of_the_model(unexpected, found):
    modules = ["", "blocks", "blocks.0", "blocks.0.q", "blocks.1", "blocks.1.q", "final", "final.0"]
    assert stray_block(unexpected, HELD, modules) == found
