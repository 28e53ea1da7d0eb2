"""The model calls under way on layers that run together.

A LoRA is call context: while a call is under way, its adapters are on the layers. Hosts run clones of one model, which
share its layers, from several threads and one call within another, and leave them in any order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers import PackedLayer
    from .residual import RunningResidual

_founding = threading.Lock()


class Calls:
    """Those of one set of layers: other threads wait, and of one thread's the last one entered and not left counts.

    Attributes:
        lock: held by the thread whose calls are under way.
        under_way: what runs beside each layer in each of these, in the order in which they were entered.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.under_way: list[Mapping[PackedLayer, RunningResidual | None]] = []

    def __reduce__(self) -> Any:
        """Of a copy of the layers none are under way."""
        return Calls, ()

    @contextlib.contextmanager
    def enter(self, beside: Mapping[PackedLayer, RunningResidual | None]) -> Iterator[None]:
        """Put `beside` on its layers; behind the block they have what the calls that are left want."""
        with self.lock:
            self.under_way.append(beside)
            try:
                for layer, residual in beside.items():
                    _put(layer, residual)
                yield
            finally:
                self.under_way = [call for call in self.under_way if call is not beside]
                for layer in beside:
                    _put(layer, next((call[layer] for call in reversed(self.under_way) if layer in call), None))


def _put(layer: PackedLayer, residual: RunningResidual | None) -> None:
    if layer.residual is not residual:  # setting an attribute of a module costs more than reading it
        layer.residual = residual


def calls_on(layers: Mapping[str, PackedLayer]) -> Calls:
    """The one object that layers which run together have in common; layers asked about together are such."""
    known = {layer.calls for layer in layers.values()}
    if len(known) == 1 and (calls := known.pop()) is not None:
        return calls
    with _founding:
        calls = next((layer.calls for layer in layers.values() if layer.calls is not None), None) or Calls()
        for layer in layers.values():
            layer.calls = calls
        return calls


__all__ = ["Calls", "calls_on"]
