"""Names of tensors: sorted, renamed and described in time, whatever they are."""

from __future__ import annotations

import torch
from graft.kernels import AdapterError
from graft.ops.files.dialects import LayerNames, bfl_control, dialect_of, extra_dialects
from graft.ops.report import cause_of, describe, examples, family_of, is_text_encoder, modules_of, split_name

from .bounds import bounded, sentence
from .choices import TEXTS, Choices

_PARTS = (
    "lora_unet_", "lora_unet__", "lycoris_", "transformer.", "unet.", "base_model.model.", "diffusion_model.",
    "model.", "double_blocks.0.", "single_blocks.0.", "single_transformer_blocks.0.", "transformer_blocks_0_", "attn.",
    "to_q", "img_attn.qkv", "img_in", "norm.query_norm.scale", ".processor.", "qkv_lora1", ".lora_A", ".lora_B",
    ".default", ".weight", ".bias", ".lora_down.weight", ".lora_up.weight", ".lora_magnitude_vector", ".dora_scale",
    ".diff_m", ".diff_b", ".diff", ".alpha", ".hada_w1_b", ".lokr_w1", ".oft_R", ".oft_blocks", ".reshape_weight",
    ".up.weight", ".down.weight", "..", ".", "0", "joint_blocks.", "input_blocks.", "lora_te1_", *TEXTS,
)  # fmt: skip
_SHAPES = ((), (0,), (1,), (4,), (4, 4), (3, 4, 1, 1), (0, 4))


def make(choices: Choices) -> dict[str, torch.Tensor]:
    state = {}
    for _ in range(choices.below(6) + 1):
        name = "".join(choices.pick(_PARTS) for _ in range(choices.below(6) + 1))
        if choices.once_in(16):
            name *= 1 + choices.below(200)
        state[name[:4096]] = torch.ones(choices.pick(_SHAPES), dtype=choices.pick((torch.float32, torch.int64)))
    return state


def check(state: dict[str, torch.Tensor]) -> None:
    nbytes = sum(map(len, state)) + sum(tensor.nbytes for tensor in state.values())
    with bounded(nbytes):
        assert isinstance(dialect_of(state), str)
        modules = modules_of(state)
        assert len(describe(state)) < 200
        sentence(AdapterError(f"{cause_of(modules, list(modules), 0, 'Flux')} {examples(list(state))!r}."))
        for name in state:
            split = split_name(name)
            assert split is None or name.startswith(split[0])
            is_text_encoder(name)
        assert isinstance(family_of(state), str)
        for norm in ("merged", "comfy"):
            renamed = extra_dialects(state, norm)
            assert len(renamed) == len(state), "a tensor is lost"
            bfl_control(renamed)
        layers = LayerNames({name: (12, 4) for name in state}, modules=modules)
        found = [target for module in (*modules, *state) for target in layers.targets(module)]
        assert all(target.key.removesuffix(".weight") in state for target in found)
