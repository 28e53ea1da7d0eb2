"""What an adapter file says about one weight: one class per kind, in the adapter's own terms.

Every class gives its exact form beside the base weight W, so that W is never rebuilt. The names and the
meaning of each factor are those of the format's trainers (kohya-ss/sd-scripts, LyCORIS, PEFT); where
they disagree on what a strength does, the form follows ComfyUI, since people compare pictures.

In the forms, F is the layer so far without its bias, s the strength, and a = alpha / rank. `p` holds the
tensors that a form reads, under the names that `tensors` gave them; nothing is worked out twice.
"""

from __future__ import annotations

from .adapter import Adapter, Current, Region
from .dora import DoRA
from .factors import Factors, Shape, times
from .glora import GLoRA
from .lokr import LoKr
from .low_rank import LoHa, LoRA
from .orthogonal import BOFT, OFT, InputOFT
from .patch import Idle, Merge, Opaque, Patch, Scale, merge
from .reshaped import Pad, Padded, Part, Permuted
from .whole import Diff, ModelDiff, Set

__all__ = [
    "BOFT", "OFT", "Adapter", "Current", "Diff", "DoRA", "Factors", "GLoRA", "Idle", "InputOFT", "LoHa", "LoKr", "LoRA",
    "Merge", "ModelDiff", "Opaque", "Pad", "Padded", "Part", "Patch", "Permuted", "Region", "Scale", "Set",
    "Shape", "merge", "times",
]  # fmt: skip
