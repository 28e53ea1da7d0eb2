"""What adapters change in a weight, as a LoRA: exact sums, and cuts that say what they lose."""

from __future__ import annotations

import math

import pytest
import torch
from graft.kernels import AdapterError
from graft.ops import extract
from graft.ops.adapters import Patch, Region
from graft.ops.extract import Change, between, change_of, cut
from graft.ops.kinds import Diff, LoHa, LoKr, LoRA, Padded
from graft.ops.strengths import Curve, Strength

SHAPE = torch.Size((24, 40))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(rank: int, seed: int, out: int = 24, columns: int = 40, alpha: float | None = None) -> LoRA:
    return LoRA(noise(out, rank, seed=seed), noise(rank, columns, seed=seed + 100), alpha)


def no_weight() -> torch.Tensor:
    raise AssertionError("asked for the weight")


def test_loras_are_put_side_by_side():
    """With strengths, alphas and parts of a fused layer in them; nobody asks for the weight."""
    patches = [
        Patch(0.5, lora(4, 1, alpha=2.0)), Patch(-1.5, lora(3, 2)), Patch(0.0, lora(5, 3)),
        Patch(2.0, lora(2, 4, out=8), region=Region(0, 10, 8)),
        Patch(1.0, lora(2, 5, columns=16), region=Region(1, 4, 16)),
    ]  # fmt: skip
    change = change_of(patches, SHAPE, no_weight)
    assert change.rank == 4 + 3 + 2 + 2 and change.full is None
    wanted = 0.5 * 0.5 * patches[0].adapter.up @ patches[0].adapter.down
    wanted = wanted - 1.5 * patches[1].adapter.up @ patches[1].adapter.down
    wanted[10:18] += 2.0 * patches[3].adapter.up @ patches[3].adapter.down
    wanted[:, 4:20] += patches[4].adapter.up @ patches[4].adapter.down
    torch.testing.assert_close(change.matrix(), wanted, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_convolutions_channels():
    shape = torch.Size((6, 8, 3, 3))
    part = LoRA(noise(6, 2, 1, 1), noise(2, 4, 3, 3, seed=1))
    change = change_of([Patch(1.0, part, region=Region(1, 2, 4))], shape, no_weight)
    wanted = torch.zeros(shape)
    wanted[:, 2:6] = (part.up.flatten(1) @ part.down.flatten(1)).view(6, 4, 3, 3)
    torch.testing.assert_close(change.matrix().view(shape), wanted)


def test_what_is_no_product_is_a_difference_in_full():
    weight = noise(*SHAPE, seed=9)
    patches = [Patch(0.5, LoKr(noise(4, 4, seed=1), noise(6, 10, seed=2))), Patch(1.0, lora(2, 3), strength_model=0.5)]
    change = change_of(patches, SHAPE, weight.clone)
    wanted = 0.5 * (weight + 0.5 * torch.kron(noise(4, 4, seed=1), noise(6, 10, seed=2))) - weight
    wanted += patches[1].adapter.up @ patches[1].adapter.down
    torch.testing.assert_close(change.full, wanted, rtol=1e-5, atol=1e-5)


def test_a_lora_that_scales_the_weight_is_no_product():
    """Nor is one on a part of a kernel, whose factors are those of no whole one."""
    weight = noise(*SHAPE, seed=9)
    (scaled,) = patches = [Patch(1.0, lora(2, 3), strength_model=0.5)]
    change = change_of(patches, SHAPE, weight.clone)
    wanted = scaled.adapter.up @ scaled.adapter.down - 0.5 * weight
    torch.testing.assert_close(change.full, wanted, rtol=1e-5, atol=1e-5)
    shape = torch.Size((6, 8, 3, 3))
    part = LoRA(noise(6, 2, 1, 1), noise(2, 8, 1, 3, seed=1))
    change = change_of([Patch(1.0, part, region=Region(2, 1, 1))], shape, lambda: torch.zeros(shape))
    wanted = torch.zeros(shape)
    wanted[:, :, 1:2] = (part.up.flatten(1) @ part.down.flatten(1)).view(6, 8, 1, 3)
    torch.testing.assert_close(change.matrix().view(shape), wanted)


def test_factors_that_are_more_numbers_than_the_weight_become_one():
    change = change_of([Patch(1.0, lora(10, 1)), Patch(1.0, lora(10, 2))], SHAPE, no_weight)
    assert change.full is not None and change.full.shape == SHAPE


def test_a_loha_of_low_rank_stays_a_product():
    loha = LoHa(noise(64, 2), noise(2, 64, seed=1), noise(64, 2, seed=2), noise(2, 64, seed=3))
    change = change_of([Patch(1.0, loha)], torch.Size((64, 64)), no_weight)
    assert change.rank == 4
    torch.testing.assert_close(change.matrix(), loha.delta(torch.zeros(64, 64)), rtol=1e-5, atol=1e-5)


def test_vectors_are_differences():
    change = change_of([Patch(2.0, Diff(torch.ones(24)))], torch.Size((24,)), lambda: torch.full((24,), 3.0))
    assert change.full.tolist() == [2.0] * 24 and cut(change, 4) is change


def test_nothing_is_none():
    assert change_of([Patch(0.0, lora(4, 1))], SHAPE, no_weight) is None
    assert change_of([], SHAPE, no_weight) is None
    assert between(torch.ones(3, 3), torch.ones(3, 3)) is None


@pytest.mark.parametrize(
    "patch, message",
    [
        (Patch(1.0, lora(4, 1), when=Strength(Curve.between(0.0, 0.5))), "no single strength"),
        (Patch(1.0, Padded(lora(4, 1, columns=48), (24, 48))), "first layer wider"),
    ],
)
def test_what_no_file_can_hold(patch, message):
    with pytest.raises(AdapterError, match=message):
        change_of([patch], SHAPE, lambda: torch.zeros(SHAPE))


@pytest.mark.parametrize("rows, columns", [(24, 40), (40, 24)])
def test_a_cut_is_the_nearest_of_its_rank_and_says_what_it_loses(rows, columns):
    """Of a product and of a full difference alike; the norms are those of fp64."""
    up, down = noise(rows, 12), noise(12, columns, seed=1)
    whole = (up @ down).double()
    values = torch.linalg.svdvals(whole)
    for change in (Change(torch.Size((rows, columns)), up, down), Change(torch.Size((rows, columns)), full=up @ down)):
        found = cut(change, 5)
        assert found.rank == 5 and found.full is None
        assert found.lost == pytest.approx(float(values[5:].norm()), rel=1e-4)
        assert found.norm == pytest.approx(float(whole.norm()), rel=1e-5)
        assert float((found.matrix() - whole).norm()) == pytest.approx(found.lost, rel=1e-3)
        assert extract.error([found]) == pytest.approx(float(values[5:].norm() / whole.norm()), rel=1e-4)
        # both factors are of one size, so that halves hold either
        assert float(found.up.norm()) == pytest.approx(float(found.down.norm()), rel=1e-3)


def test_a_rank_that_is_enough_cuts_nothing():
    product = Change(SHAPE, noise(24, 4), noise(4, 40, seed=1))
    assert cut(product, 8) is product and extract.error([product]) == 0.0
    found = cut(Change(SHAPE, full=product.matrix()), 16)
    assert found.rank == 4 and found.lost < 1e-5 * found.norm


def test_the_same_lora_twice_needs_its_rank_once():
    twice = change_of([Patch(0.5, lora(4, 1)), Patch(0.25, lora(4, 1))], SHAPE, no_weight)
    found = cut(twice, 6)
    assert found.rank == 4
    torch.testing.assert_close(found.matrix(), 0.75 * lora(4, 1).up @ lora(4, 1).down, rtol=1e-4, atol=1e-4)


def test_large_differences_are_cut_without_all_their_singular_values(monkeypatch):
    """Subspace iteration against the decomposition in full, on a spectrum that falls slowly, as those of models do."""
    monkeypatch.setattr(extract, "_SVD_IN_FULL", 32)
    left, _ = torch.linalg.qr(noise(200, 160))
    right, _ = torch.linalg.qr(noise(300, 160, seed=1))
    values = 1.0 / torch.arange(1, 161).float().sqrt()
    whole = left * values @ right.T
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = cut(Change(whole.shape, full=whole), 24)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.lost == pytest.approx(float(values[24:].norm()), rel=2e-3)


def test_convolutions_are_cut_as_matrices():
    shape = torch.Size((8, 4, 3, 3))
    found = cut(Change(shape, full=noise(*shape)), 3)
    assert found.up.shape == (8, 3) and found.down.shape == (3, 36)


def test_a_cut_for_inputs_is_the_nearest_in_what_the_layer_gives():
    """As the decomposition of E·C^(1/2) says it, on inputs that lie mostly in a few directions."""
    whole, inputs = noise(24, 40), noise(500, 40, seed=1) * torch.logspace(0, -2, 40)
    values = torch.linalg.svdvals((whole @ inputs.T).double())
    found = cut(Change(SHAPE, full=whole), 6, inputs)
    assert found.rank == 6
    assert found.lost == pytest.approx(float(values[6:].norm()), rel=1e-3)
    assert found.norm == pytest.approx(float(values.norm()), rel=1e-4)
    plain = cut(Change(SHAPE, full=whole), 6)
    assert found.lost < float(((whole - plain.matrix()) @ inputs.T).norm())
    assert float(found.up.norm()) == pytest.approx(float(found.down.norm()), rel=1e-3)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(AdapterError, match="calibration is of another model, with 41 columns where a weight has 40"):
        cut(Change(SHAPE, full=noise(24, 40)), 6, noise(10, 41))


def test_a_change_that_is_nothing_stays_nothing():
    """Trainers leave zeros in layers that learnt nothing; divided by their size they would be NaN."""
    found = cut(Change(SHAPE, torch.zeros(24, 8), noise(8, 40)), 4)
    assert found.rank <= 4 and torch.equal(found.matrix(), torch.zeros(SHAPE)) and (found.lost, found.norm) == (0, 0)


def test_a_layer_that_was_given_zeros_is_cut_as_without_a_calibration():
    whole = noise(24, 40)
    whole[0] = 0
    found = cut(Change(SHAPE, full=whole), 4, torch.zeros(10, 40))
    assert torch.equal(found.matrix(), cut(Change(SHAPE, full=whole), 4).matrix()) and found.norm == 0


def test_what_is_not_finite_is_refused():
    with pytest.raises(AdapterError, match="not finite"):
        cut(Change(SHAPE, full=torch.full(SHAPE, math.nan)), 4)
