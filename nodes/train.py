"""Train LoRA (Graft): a LoRA that is learnt beside the quantized weights that it will run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import AdapterError
from ..ops.files.lora_writer import FORMS
from ..ops.trainable import KINDS
from ..ops.training import SCHEDULES, optimizers
from . import node
from .lora import NONE
from .patcher import GraftPatcher
from .train_session import DTYPES, HOME, Inputs, Session, found_lora, loras
from .train_targets import LAYERS

LORA_MODEL = "LORA_MODEL"
"""What the host's own nodes call the tensors of a LoRA."""
FILES = [form for form, dtype in FORMS.items() if dtype is not None]

_NOT_OURS = (
    "Train LoRA (Graft) trains on a model of Load Diffusion Model (GGUF, Graft): load the model with that node, or use "
    "ComfyUI's Train LoRA"
)

_TOOLTIPS = {
    "model": "A model of Graft's loader. LoRAs that are on it stay on it.",
    "latents": "Your pictures, from VAE Encode: one batch, or a list of latents.",
    "positive": "The captions: one for all pictures, or one for each, in the same order.",
    "steps": "How many steps in all. If you go on from an earlier run, its steps count, too.",
    "learning_rate": "How much a step changes. Try 0.0001 first. If the loss jumps, take a smaller number.",
    "rank": "How much the LoRA can hold. 16 is enough for most styles.",
    "layers": "What is trained. 'attention and MLP' suits nearly everything. 'all' takes layers outside blocks, too.",
    "filename_prefix": "Folder and beginning of the file's name, in ComfyUI's output.",
    "trigger_phrase": "The words in your captions that mean the new thing. They go into the file.",
    "seed": "Decides the noise, the order of the pictures, and what the LoRA starts from.",
    "batch_size": "How many pictures a step sees at once. More needs more memory.",
    "accumulate": "How many such batches make one step: like a larger batch, without more memory.",
    "kind": "LoRA is the usual one. DoRA also learns a strength for each row. LoKr makes small files.",
    "alpha": "What is learnt is scaled by alpha / rank. 0 is the same as rank: no scaling.",
    "schedule": "How the learning rate changes. It always rises in the first steps.",
    "optimizer": "AdamW is the usual one. 8-bit ones are in the list if bitsandbytes is installed.",
    "compute": "Precision of the model. auto: as when it samples, but never fp16. The LoRA itself learns in fp32.",
    "gradient_checkpointing": "Saves memory, and a step takes longer. Switch it off if you have enough memory.",
    "pattern": "Instead of 'layers': parts of layer names, with commas, such as blocks.0., *.ffn.* . May stay empty.",
    "resume_from": "Go on from this LoRA. With its .training file in the same folder, the run goes on exactly where it "
    "stopped. Layers, rank and kind come from the file.",
    "file": "How the file stores its numbers.",
    "sample_every": "Draws a picture every so many steps. 0: none.",
    "sample_steps": "Steps of the sampler for these pictures.",
    "sample_cfg": "Guidance (CFG) of these pictures.",
    "negative": "The negative prompt of these pictures. It is used if sample_cfg is not 1.",
    "teacher": "For a repair LoRA: the same model in a larger type. The LoRA learns to give what the teacher gives. "
    "You need no pictures: latents that the teacher drew are enough.",
}


class GraftTrainLora:
    """Train LoRA (Graft)."""

    DESCRIPTION = (
        "Trains a LoRA on a quantized model: on the same weights that it will run on later. The model's file is not "
        "changed. Weights in Q4_K take less than a third of the memory that they take in bf16."
    )
    SEARCH_ALIASES = ["train lora", "lora training", "finetune", "qlora", "dora", "lokr", "dreambooth"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", LORA_MODEL, "IMAGE", "LATENT", "STRING", "STRING")
    RETURN_NAMES = ("MODEL", "lora", "loss_plot", "samples", "path", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the new LoRA on it.",
        "The LoRA itself, for ComfyUI's Save LoRA or Load LoRA Model.",
        "The loss of every step, and its mean.",
        "The pictures that were drawn on the way, the first one first. Connect VAE Decode.",
        "Where the LoRA's file is.",
        "What was trained, and how it went.",
    )
    OUTPUT_NODE = True
    FUNCTION = "train"
    INPUT_IS_LIST = True  # a list of latents is one training

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        def of(name: str, kind: Any, **more: Any) -> tuple:
            return kind, {**more, "tooltip": _TOOLTIPS[name]}

        def whole(name: str, default: int, low: int, high: int) -> tuple:
            return of(name, "INT", default=default, min=low, max=high)

        rate = {"default": 1e-4, "min": 1e-7, "max": 1.0, "step": 1e-7, "round": 1e-7}
        return {
            "required": {
                "model": of("model", "MODEL"),
                "latents": of("latents", "LATENT"),
                "positive": of("positive", "CONDITIONING"),
                "steps": whole("steps", 500, 1, 1_000_000),
                "learning_rate": of("learning_rate", "FLOAT", **rate),
                "rank": whole("rank", 16, 1, 512),
                "layers": of("layers", list(LAYERS)),
                "filename_prefix": of("filename_prefix", "STRING", default="loras/Graft"),
                "trigger_phrase": of("trigger_phrase", "STRING", default=""),
                "seed": of("seed", "INT", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
            },
            "optional": {
                "batch_size": whole("batch_size", 1, 1, 1024),
                "accumulate": whole("accumulate", 1, 1, 1024),
                "kind": of("kind", list(KINDS)),
                "alpha": of("alpha", "FLOAT", default=0.0, min=0.0, max=4096.0, step=0.5),
                "schedule": of("schedule", list(SCHEDULES)),
                "optimizer": of("optimizer", list(optimizers())),
                "compute": of("compute", list(DTYPES)),
                "gradient_checkpointing": of("gradient_checkpointing", "BOOLEAN", default=True),
                "pattern": of("pattern", "STRING", default=""),
                "resume_from": of("resume_from", [NONE, *loras()], default=NONE),
                "file": of("file", FILES),
                "sample_every": whole("sample_every", 0, 0, 1_000_000),
                "sample_steps": whole("sample_steps", 20, 1, 1000),
                "sample_cfg": of("sample_cfg", "FLOAT", default=1.0, min=0.0, max=100.0, step=0.1),
                "negative": of("negative", "CONDITIONING"),
                "teacher": of("teacher", "MODEL"),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, resume_from: Any = None, **_: Any) -> Any:
        name = resume_from[0] if isinstance(resume_from, list) and resume_from else resume_from
        return node.UNKNOWN if name in (None, NONE) else node.file_state(found_lora(name).path)

    @classmethod
    def VALIDATE_INPUTS(cls, resume_from: Any = None) -> bool | str:
        name = resume_from[0] if isinstance(resume_from, list) and resume_from else resume_from
        return name in (None, NONE) or found_lora(name).valid(HOME)

    def train(
        self, model: list, latents: list, positive: list, steps: list, learning_rate: list, rank: list, layers: list,
        filename_prefix: list, trigger_phrase: list, seed: list, batch_size: Sequence = (1,),
        accumulate: Sequence = (1,), kind: Sequence = ("LoRA",), alpha: Sequence = (0.0,),
        schedule: Sequence = (SCHEDULES[0],), optimizer: Sequence = ("AdamW",), compute: Sequence = ("auto",),
        gradient_checkpointing: Sequence = (True,), pattern: Sequence = ("",), resume_from: Sequence = (NONE,),
        file: Sequence = (FILES[0],), sample_every: Sequence = (0,), sample_steps: Sequence = (20,),
        sample_cfg: Sequence = (1.0,), negative: Sequence = (None,), teacher: Sequence = (None,),
        unique_id: Sequence = (None,),
    ) -> dict:  # fmt: skip
        inputs = Inputs(
            model[0], latents, positive, steps[0], learning_rate[0], rank[0], layers[0], filename_prefix[0],
            trigger_phrase[0], seed[0], batch_size[0], accumulate[0], kind[0], alpha[0], schedule[0], optimizer[0],
            compute[0], gradient_checkpointing[0], pattern[0], resume_from[0], file[0], sample_every[0],
            sample_steps[0], sample_cfg[0], negative[0], teacher[0], unique_id[0],
        )  # fmt: skip
        if not isinstance(inputs.model, GraftPatcher):
            raise AdapterError(_NOT_OURS)
        with torch.inference_mode(False), torch.enable_grad():
            return Session(inputs).result()


__all__ = ["GraftTrainLora"]
