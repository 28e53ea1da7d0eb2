"""What is collected of layers' inputs, against a direct computation."""

from __future__ import annotations

import threading

import pytest
import torch
from graft.kernels import GraftError
from graft.ops import layers as packed
from graft.ops.calibration import Calibration, watched_layers
from torch import nn
from torch.nn import functional as F


def packed_like(layer: nn.Module) -> nn.Module:
    """Our layer with the weight of one of torch's."""
    arguments = {
        name: getattr(layer, name)
        for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        if hasattr(layer, name)
    }
    if isinstance(layer, nn.Linear):
        ours = packed.Linear(layer.in_features, layer.out_features)
    else:
        kind = getattr(packed, type(layer).__name__)
        ours = kind(layer.in_channels, layer.out_channels, layer.kernel_size, **arguments)
    ours.load_state_dict(layer.state_dict())
    return ours


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def collected(layer: nn.Module, *inputs: torch.Tensor):
    calibration = Calibration()
    with calibration.watching({"layer": layer}), torch.no_grad():
        for x in inputs:
            layer(x)
    return calibration.importance()


@pytest.mark.parametrize("make", [lambda layer: layer, packed_like], ids=["torch's", "ours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(make, dtype):
    layer = make(nn.Linear(24, 8)).to(dtype)
    x = noise(3, 5, 24, dtype=dtype)
    found = collected(layer, x, 2 * x[:1])
    rows = torch.cat([x.reshape(-1, 24), 2 * x[0]]).double()
    torch.testing.assert_close(found["layer.weight"], rows.square().mean(0).float(), rtol=1e-6, atol=0)
    assert found.rows("layer.weight") == 20


CONVOLUTIONS = {
    "1d": (nn.Conv1d(6, 4, 3, padding=1), (2, 6, 11)),
    "2d": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 9, 8)),
    "same": (nn.Conv2d(6, 4, 3, padding="same"), (1, 6, 5, 7)),
    "reflect": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (1, 6, 5, 7)),
    "circular": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (1, 6, 5, 7)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 7)),
    "patches": (nn.Conv3d(6, 4, (1, 2, 2), stride=(1, 2, 2)), (1, 6, 2, 6, 4)),
    "one picture": (nn.Conv2d(6, 4, 3), (6, 5, 7)),
}


@pytest.mark.parametrize("make", [lambda layer: layer, packed_like], ids=["torch's", "ours"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, make):
    """The mean square of what a column is multiplied by: a convolution of x² with ones in that column, on average."""
    layer, shape = CONVOLUTIONS[name]
    x = noise(*shape)
    inner = layer.weight.shape[1:]
    wanted = []
    for column in range(inner.numel()):
        probe = torch.zeros(layer.groups, inner.numel(), dtype=torch.float64)
        probe[:, column] = 1.0
        padded = F.pad(
            x.double().square(),
            layer._reversed_padding_repeated_twice,
            "constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )
        convolve = getattr(F, f"conv{len(layer.kernel_size)}d")
        y = convolve(padded, probe.view(-1, *inner), stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
        wanted.append(y.mean())
    found = collected(make(layer), x)["layer.weight"]
    torch.testing.assert_close(found, torch.stack(wanted).float(), rtol=1e-6, atol=0)


def test_neither_batch_nor_chunks_change_the_numbers(monkeypatch):
    from graft.ops import calibration

    linear, convolution = nn.Linear(16, 4), nn.Conv2d(3, 4, 3)
    x, pictures = noise(6, 9, 16), noise(6, 3, 8, 8)
    whole = [collected(linear, x), collected(convolution, pictures)]
    monkeypatch.setattr(calibration, "_CHUNK", 32)
    parts = [collected(linear, *x.split(1)), collected(convolution, *pictures.split([2, 4]))]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one["layer.weight"], other["layer.weight"], rtol=2**-23, atol=0)
        assert one.rows("layer.weight") == other.rows("layer.weight")


def test_bf16_is_counted_as_the_numbers_that_it_is():
    """A sum in bf16 would stop growing at 256 times the first square."""
    found = collected(nn.Linear(1, 1).bfloat16(), torch.ones(100_000, 1, dtype=torch.bfloat16))
    assert found["layer.weight"].item() == 1.0 and found.rows("layer.weight") == 100_000


def test_nothing_is_left_on_the_layers_and_outputs_are_the_same():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(3, 3, 1))
    x = noise(3, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="stop"), Calibration().watching(watched_layers(model)):
        assert torch.equal(model(x), before)
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())
    calibration = Calibration()
    model(x)
    assert not calibration.importance()


def test_what_is_watched():
    model = nn.ModuleDict({
        "linear": nn.Linear(4, 4), "ours": packed.Linear(4, 4), "conv": packed.Conv3d(2, 2, 1), "norm": nn.LayerNorm(4),
        "table": nn.Embedding(4, 4), "our_table": packed.Embedding(4, 4), "up": nn.ConvTranspose2d(2, 2, 2),
    })  # fmt: skip
    assert list(watched_layers(model)) == ["linear", "ours", "conv"]


def test_calls_of_another_thread_do_not_count():
    layer, calibration = nn.Linear(4, 4), Calibration()
    with calibration.watching({"layer": layer}):
        other = threading.Thread(target=layer, args=(noise(7, 4),))
        other.start()
        other.join()
        layer(noise(2, 4))
    assert calibration.importance().rows("layer.weight") == 2


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(wrong):
    x = noise(2, 4)
    x[1, 2] = wrong
    with pytest.raises(GraftError, match=r"what goes into layer was not a number"):
        collected(nn.Linear(4, 4), x)


def test_columns_that_change_are_refused():
    calibration = Calibration()
    calibration.count("layer", nn.Linear(4, 4), noise(2, 4))
    with pytest.raises(GraftError, match="one calibration takes one model"):
        calibration.count("layer", nn.Linear(4, 4), noise(2, 5))


def test_a_sketch_stands_for_the_inputs():
    """SᵀS is their sum of x xᵀ, as far as chance allows: a relative error of sqrt(2 / rows) in its norm."""
    x, layer = noise(20, 100, 16) * torch.logspace(0, -1, 16), nn.Linear(16, 4)
    parts = [Calibration(512), Calibration(512)]
    for calibration, part in zip(parts, x.split(10), strict=True):
        with calibration.watching({"layer": layer}), torch.no_grad():
            layer(part)
    parts[0].add(parts[1])
    for found in (parts[0].importance(), parts[1].importance() + collected(layer, x)):
        assert found.sketches["layer.weight"].shape == (512, 16)
    rows = x.reshape(-1, 16)
    wanted, sketch = rows.T @ rows, parts[0].importance().sketches["layer.weight"]
    assert float((sketch.T @ sketch - wanted).norm() / torch.trace(wanted)) < 2 * (2 / 512) ** 0.5
    assert not collected(layer, x).sketches


def test_a_sketch_takes_all_calls_and_its_signs():
    """Of inputs that have much in common, rows of one sign would add up, and a last call be half of them."""
    x, layer, calibration = noise(2, 1000, 16) + 3.0, nn.Linear(16, 4), Calibration(512)
    with calibration.watching({"layer": layer}), torch.no_grad():
        for call in x:
            layer(call)
    rows, sketch = x.reshape(-1, 16), calibration.importance().sketches["layer.weight"]
    wanted = rows.T @ rows
    assert float((sketch.T @ sketch - wanted).norm() / wanted.norm()) < 5 * (2 / 512) ** 0.5


def test_sketches_of_two_calibrations_are_made_by_other_chance():
    """Or their sum would take inputs that never met for ones that come together."""
    layer, x = nn.Linear(16, 4), noise(50, 16)
    found = []
    for _ in range(2):
        calibration = Calibration(64)
        with calibration.watching({"layer": layer}), torch.no_grad():
            layer(x)
        found.append(calibration.importance().sketches["layer.weight"])
    assert not torch.equal(*found)
