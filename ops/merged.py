"""`MergedTensor`: a weight with its adapters merged in, worked out when it is read.

Hosts list a model's weights far more often than they read one: for their names, shapes and dtypes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .packed import on_weights, written

_aten = torch.ops.aten
_KEPT = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
_READ_ONLY = "a weight with its adapters merged in is read-only: clone() it"


class MergedTensor(torch.Tensor):
    """Looks like an fp32 tensor; every operation on it merges anew, and goes on with an ordinary tensor."""

    source: torch.Tensor
    _merge: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, merge: Callable[[], torch.Tensor], shape: Sequence[int], source: torch.Tensor) -> MergedTensor:
        """Args:
        merge: gives the weight in fp32, in memory of its own.
        shape: that of the result.
        source: what the model holds of it in memory, without adapters.
        """
        # a view made in inference mode of a tensor from outside of it has to be an ordinary tensor, too
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, tuple(shape), dtype=torch.float32, device=source.device, requires_grad=False
            )
        self._merge, self.source = merge, source
        return self

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What the model holds of it in memory, by which hosts count."""
        return self.source.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as an ordinary tensor of the same shape, in `dtype` or fp32."""
        return self._merge().to(dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MergedTensor({list(self.shape)}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self.dequantize()

    def storage(self) -> Any:
        """What safetensors asks for at last, before it saves."""
        raise TypeError("a weight that is worked out when it is read has no storage to save: clone() it first")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(_READ_ONLY)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _KEPT:
            tensor = args[0]
            return cls(tensor._merge, tensor.shape, tensor.source)
        kwargs = kwargs or {}
        if any(isinstance(tensor, cls) for tensor in written(func, args, kwargs)):
            raise TypeError(_READ_ONLY)
        return on_weights(func, args, kwargs, cls)


__all__ = ["MergedTensor"]
