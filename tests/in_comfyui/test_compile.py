"""`torch.compile` on a Graft MODEL, through ComfyUI's own node."""

from __future__ import annotations

import comfy.lora
import comfy_extras.nodes_torch_compile
import pytest
import torch
from generation import distance, sample, with_lora
from loras import make_lora
from small import SD3, loras, sd3  # noqa: F401  (fixtures)


class Counting:
    """A dynamo backend that runs the traced graph as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_block(model, counting):
    """One transformer block compiled, as the node does with its `keys` option."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = model.clone()
    mlp = "diffusion_model.joint_blocks.0.x_block.mlp"
    set_torch_compile_wrapper(compiled, backend=counting, fullgraph=True, keys=[mlp])
    return compiled


def test_strengths_and_loras_of_one_bucket_do_not_recompile(sd3, loras, fresh):  # noqa: F811
    graft, _ = sd3
    shapes = {key: value.shape for key, value in sd3[1].model.state_dict().items()}
    other = make_lora(sd3[1].model, shapes, "native", SD3.lora_layers, rank=11, seed=9)
    counting = Counting()
    plain = compiled_block(graft, counting)
    assert distance(sample(plain, SD3), sample(graft, SD3)) < 1e-6
    without = len(counting.graphs)
    assert without == 1, "fullgraph: one graph, no break inside our layers"
    seen = []
    for lora, strength in ((loras[0], 0.3), (loras[0], 0.9), (loras[0], -1.0), (other, 0.7), (other, 0.1)):
        assert distance(
            sample(with_lora(plain, lora, strength), SD3), sample(with_lora(graft, lora, strength), SD3)
        ) < 1e-6
        seen.append(len(counting.graphs))
    assert seen[0] == seen[-1] == without + 1, f"graphs after each change: {seen}"
    assert torch.equal(sample(graft, SD3), sample(graft.clone(), SD3))


def test_masks_and_schedules_do_not_recompile(pack, sd3, loras, fresh):  # noqa: F811
    graft, dense = sd3
    module = pack("ops.strengths")
    keys = comfy.lora.model_lora_keys_unet(dense.model, {})
    patches = comfy.lora.load_lora(dict(loras[0]), keys)
    counting = Counting()
    seen, pictures = [], []
    masks = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for number, mask in enumerate(masks):
        when = module.Strength(module.Curve(((0.0, 1.0, "linear"), (1.0, 0.1 * number, "hold"))), mask)
        branch = graft.clone()
        branch.add_patches(patches, 0.5 + number, when=when)
        pictures.append(sample(compiled_block(branch, counting), SD3, steps=2))
        assert distance(pictures[-1], sample(branch, SD3, steps=2)) < 1e-6
        seen.append(len(counting.graphs))
    assert seen == [1, 1, 1], f"graphs after each change: {seen}"
    assert distance(pictures[0], pictures[1]) > 1e-3


def test_the_node_compiles_the_whole_model_with_inductor(sd3, loras, fresh):  # noqa: F811
    graft, _ = sd3
    node = comfy_extras.nodes_torch_compile.TorchCompileModel
    apply = node.execute if hasattr(node, "execute") else node().patch
    result = apply(with_lora(graft, loras[0], 0.8), "inductor")
    model = result.args[0] if hasattr(result, "args") else result[0]
    assert distance(sample(model, SD3), sample(with_lora(graft, loras[0], 0.8), SD3)) < 1e-4
