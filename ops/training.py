"""Training adapters beside the packed weights of a frozen model, without a host.

    training = Training(packed_layers(model), [Target("blocks.0.ffn.0")], rank=16)
    run = Run(training, Plan(steps=500))
    while run.step < run.plan.steps:
        run.advance([lambda: loss_of(model)])           # within `training.beside()`

What is random follows from the seed and the step, so that a run that goes on from a file of its state is the run that
was not interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels import AdapterError, GraftError
from .calls import calls_on
from .files.lora import Placed
from .files.lora_writer import kohya_module, write_tensors
from .kinds import Adapter, DoRA, LoKr, LoRA, Patch, Region
from .layers import PackedLayer
from .trainable import Beside, Target, Trainable, TrainableDoRA, TrainableLoKr, TrainableLoRA, beginning

_WRITTEN_TO = "modified by an inplace operation"
"""Of what torch says where a model writes into a tensor that autograd has kept."""

LONGEST_GRADIENT = 1.0
"""To which gradients are shortened."""
WARM_UP = 100
"""Steps of a long run in which the rate rises; a tenth of a short one."""


class Training(nn.Module):
    """What learns beside the layers of a model.

    Args:
        layers: the model's, by path.
        targets: what is to learn.
        kind: ``LoRA``, ``DoRA`` or ``LoKr``.
        alpha: over rank, what is added is scaled by; 0 stands for the rank.
        before: what runs beside the layers already, by parameter.

    Attributes:
        targets: what learns, in the order of the model, whatever that of a file is: sums are rounded in the same one.
        learners: one for each.

    Raises:
        AdapterError: there are no targets, or the kind cannot learn there.
    """

    def __init__(
        self, layers: Mapping[str, PackedLayer], targets: Sequence[Target], kind: str = "LoRA", rank: int = 16,
        alpha: float = 0.0, seed: int = 0, before: Mapping[str, Sequence[Patch]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not targets:
            raise AdapterError("no layer is left to train: choose other layers")
        self.targets, self.kind = tuple(sorted(targets, key=_in_order(layers))), kind
        _check_file(kind, self.targets)
        self._layers = dict(layers)  # not as a module: these are not its own
        random = torch.Generator().manual_seed(seed)
        self.learners = nn.ModuleList(
            _beginning(kind, layers, target, rank, alpha, random, before or {}) for target in self.targets
        )

    @classmethod
    def going_on(
        cls, layers: Mapping[str, PackedLayer], placed: Sequence[Placed],
        before: Mapping[str, Sequence[Patch]] | None = None, told: str = "",
    ) -> Training:  # fmt: skip
        """From the adapters of a file: their layers, kind and ranks.

        Args:
            told: what the training that wrote the file said of its rows (`Training.rows`).

        Raises:
            AdapterError: they are of a kind that cannot learn here, or of several.
        """
        rows = _regions(told)
        placed = [_narrowed(one, rows.get(one.target.layer)) for one in placed]
        kinds = {_kind_of(one.adapter) for one in placed if one.parameter == "weight"}
        if len(kinds) != 1 or any(one.parameter != "weight" for one in placed) or None in kinds:
            raise AdapterError("this LoRA is of a kind that cannot be trained here: choose a LoRA, a DoRA or a LoKr")
        kind: Any = kinds.pop()
        training = cls.__new__(cls)
        nn.Module.__init__(training)
        at = _in_order(layers)
        placed = sorted(placed, key=lambda one: at(Target(one.target.layer, one.region)))
        training.targets = tuple(Target(one.target.layer, one.region) for one in placed)
        _check_file(kind, training.targets)
        training.kind, training._layers = kind, dict(layers)
        training.learners = nn.ModuleList()
        for one in placed:
            random, target = torch.Generator().manual_seed(0), Target(one.target.layer, one.region)
            learner = _beginning(kind, layers, target, _rank_of(one.adapter), 0.0, random, before or {})
            _take(learner, one.adapter)
            training.learners.append(learner)
        return training

    @property
    def rank(self) -> int:
        """The highest."""
        return max(learner.rank for _, learner in self.each())

    def each(self) -> Iterator[tuple[Target, Trainable]]:
        """What learns, and where."""
        return zip(self.targets, self.learners, strict=True)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def beside(self, layers: Mapping[str, PackedLayer] | None = None) -> Iterator[None]:
        """Run the model, or these of its layers or of a copy's, with what learns on top of what runs there already."""
        layers = self._layers if layers is None else layers
        calls = calls_on(layers)
        with calls.lock:
            running: dict[PackedLayer, Any] = {}
            for target, learner in self.each():
                layer = layers.get(target.layer)
                if layer is None:
                    continue  # a host calls some layers by themselves
                running[layer] = Beside(learner, running.get(layer, layer.residual))
            with calls.enter(running):
                yield

    def named(self) -> dict[str, nn.Parameter]:
        """What learns, by names that tell where: the same ones in every run."""
        found: dict[str, nn.Parameter] = {}
        for target, learner in self.each():
            rows = "" if target.region is None else f"[{target.region.start}:{target.region.length}]"
            found |= {f"{target.layer}{rows}.{name}": parameter for name, parameter in learner.named_parameters()}
        return found

    def patches(self, strength: float = 1.0) -> dict[str, list[Patch]]:
        """What has been learnt, as patches around copies of the factors, by parameter."""
        found: dict[str, list[Patch]] = {}
        for target, learner in self.each():
            adapter = _detached(learner.adapter())
            found.setdefault(f"{target.layer}.weight", []).append(Patch(strength, adapter, region=target.region))
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of a file in kohya's names, fp32, on the CPU and independent of what learns on."""
        by_layer: dict[str, list[Trainable]] = {}
        for target, learner in self.each():
            by_layer.setdefault(target.layer, []).append(learner)
        state: dict[str, torch.Tensor] = {}
        for path, learners in by_layer.items():
            for name, tensor in _joined(learners).items():
                state[f"{kohya_module(path)}.{name}"] = tensor.to("cpu", torch.float32, copy=True).contiguous()
        return state

    def rows(self) -> str:
        """Which rows learn of the layers that learn in part, as JSON for a file that a later run goes on from."""
        found = {target.layer: target.region[1:] for target in self.targets if target.region is not None}
        for layer, count in Counter(target.layer for target in self.targets).items():
            if count > 1:
                found.pop(layer, None)  # in the file they are one
        return json.dumps(found) if found else ""


def _regions(told: str) -> dict[str, Region]:
    """What `Training.rows` gave, from a file that may have been written to since; what it is not counts as nothing."""
    try:
        found = {layer: Region(0, int(start), int(length)) for layer, (start, length) in json.loads(told).items()}
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return {}
    return {layer: region for layer, region in found.items() if region.start >= 0 < region.length}


def _narrowed(one: Placed, region: Region | None) -> Placed:
    """What a file has for a whole layer, with zeros for what does not learn, as one of the rows that do."""
    adapter = one.adapter
    if region is None or one.region is not None or _kind_of(adapter) is None:
        return one
    try:
        part = adapter.rows(region.start, region.length)
    except (IndexError, RuntimeError):
        return one  # it has no such rows
    if _kind_of(part) is None or _leading(part).count_nonzero() < _leading(adapter).count_nonzero():
        return one
    return one._replace(target=one.target._replace(region=region), adapter=part)


def _leading(adapter: Any) -> torch.Tensor:
    """The factor that has a row for each output, or for each group of them."""
    if isinstance(adapter, DoRA):
        return _leading(adapter.inner)
    factor: torch.Tensor = getattr(adapter, "w1" if isinstance(adapter, LoKr) else "up")
    return factor


def _check_file(kind: str, targets: Sequence[Target]) -> None:
    """Raise AdapterError where no file could hold what is learnt."""
    layer, count = Counter(target.layer for target in targets).most_common(1)[0]
    if kind == TrainableLoKr.kind and count > 1:
        raise AdapterError(
            f"{layer} is in {count} parts here, whose LoKrs cannot stand in one file: train a LoRA or a DoRA, or begin "
            "a new LoKr"
        )


def _in_order(layers: Mapping[str, PackedLayer]) -> Callable[[Target], tuple[int, int]]:
    places = {path: place for place, path in enumerate(layers)}
    return lambda target: (places[target.layer], 0 if target.region is None else target.region.start)


def _beginning(
    kind: str, layers: Mapping[str, PackedLayer], target: Target, rank: int, alpha: float, random: torch.Generator,
    before: Mapping[str, Sequence[Patch]],
) -> Trainable:  # fmt: skip
    path = target.layer
    if kind == TrainableDoRA.kind and f"{path}.bias" in before:
        raise AdapterError(
            f"take off the LoRA that changes the bias of {path}, or train a LoRA: a DoRA cannot learn next to it"
        )
    patches = before.get(f"{path}.weight", ())
    return beginning(kind, path, layers[path], target.region, rank, alpha, random, patches)


def _kind_of(adapter: Adapter) -> str | None:
    if isinstance(adapter, DoRA):
        plain = adapter.axis == 0 and adapter.norm == "comfy" and _kind_of(adapter.inner) == TrainableLoRA.kind
        return TrainableDoRA.kind if plain else None
    if isinstance(adapter, LoRA):
        return TrainableLoRA.kind if adapter.mid is None and not isinstance(adapter.alpha, tuple) else None
    if isinstance(adapter, LoKr):
        parts = adapter.w1_a, adapter.w1_b, adapter.t2
        return TrainableLoKr.kind if all(part is None for part in parts) else None
    return None


def _rank_of(adapter: Adapter) -> int:
    if isinstance(adapter, DoRA):
        return _rank_of(adapter.inner)
    if isinstance(adapter, LoKr):
        return 1 << 30 if adapter.w2_b is None else adapter.w2_b.shape[0]
    assert isinstance(adapter, LoRA)
    return adapter.rank


def _take(learner: Any, adapter: Adapter) -> None:
    shapes = {name: tensor.numel() for name, tensor in learner.named_parameters()}
    try:
        learner.take(adapter)
    except (AttributeError, RuntimeError) as error:
        raise AdapterError(f"this LoRA has other factors than {shapes}, which are trained here: begin anew") from error


def _detached(adapter: Adapter) -> Adapter:
    """Around copies of its tensors."""
    made = object.__new__(type(adapter))
    for name, value in vars(adapter).items():
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
        elif isinstance(value, Adapter):
            value = _detached(value)
        object.__setattr__(made, name, value)
    return made


def _joined(learners: Sequence[Trainable]) -> Mapping[str, torch.Tensor]:
    """One LoRA or DoRA of those on several parts of a layer: their ranks side by side, their scales in the factors."""
    parts = [learner.tensors() for learner in learners]
    if len(parts) == 1:
        return parts[0]
    scales = [float(part["alpha"]) / len(part["lora_down.weight"]) for part in parts]
    down = torch.cat([part["lora_down.weight"] for part in parts])
    up = torch.cat([part["lora_up.weight"] * scale for part, scale in zip(parts, scales, strict=True)], 1)
    joined = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(len(down)))}
    if "dora_scale" in parts[0]:
        joined["dora_scale"] = parts[0]["dora_scale"].clone()  # outside of its own rows the norms, which change nothing
        for learner, part in zip(learners[1:], parts[1:], strict=True):
            assert learner.region is not None
            joined["dora_scale"].narrow(*learner.region).copy_(part["dora_scale"].narrow(*learner.region))
    return joined


@cache
def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Torch's own that suit factors, and 8-bit ones where bitsandbytes is installed."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        "Adam": torch.optim.Adam,
        "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        "RMSprop": torch.optim.RMSprop,
    }
    if hasattr(torch.optim, "Adafactor"):
        found["Adafactor"] = torch.optim.Adafactor
    if importlib.util.find_spec("bitsandbytes") is not None:
        found["AdamW 8-bit"] = lambda parameters, lr: _bitsandbytes().AdamW8bit(parameters, lr=lr, weight_decay=0.0)
        found["Lion 8-bit"] = lambda parameters, lr: _bitsandbytes().Lion8bit(parameters, lr=lr)
    return found


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.optim")


SCHEDULES = ("cosine", "linear", "constant")
"""How the rate goes on once it is at its height; the first two end at 0."""


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: in all, also for a run that goes on from an earlier one.
        rate: of learning, at its height.
        schedule: one of `SCHEDULES`.
        optimizer: one of `optimizers`.
    """

    steps: int
    rate: float = 1e-4
    schedule: str = SCHEDULES[0]
    optimizer: str = "AdamW"
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Of learning: linear up, then as the schedule says."""
        warm_up = min(WARM_UP, self.steps // 10)
        if step < warm_up:
            return self.rate * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        shares = {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1.0}
        return self.rate * shares[self.schedule]


def _copies_kept() -> saved_tensors_hooks:
    """For models that write into what autograd keeps: it keeps copies.

    `torch.autograd.graph.allow_mutation_on_saved_tensors` copies only what is written to, but knows tensors by their
    place in memory, and takes one for another that had it before: gradients come out wrong, now and then.
    """
    return saved_tensors_hooks(
        lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.clone(), lambda tensor: tensor
    )


class Run:
    """A training on its way.

    Attributes:
        step: how many are done.
        losses: of each.
    """

    def __init__(self, training: Training, plan: Plan) -> None:
        self.training, self.plan = training, plan
        self.parameters = list(training.named().values())
        self.optimizer = optimizers()[plan.optimizer](self.parameters, lr=plan.rate)
        self.step, self.losses = 0, list[float]()
        self._mutates = False

    def random(self) -> torch.Generator:
        """What is random in the step that comes next."""
        return torch.Generator().manual_seed(self._seed("step", self.step))

    def examples(self, count: int, size: int) -> list[int]:
        """Which `size` of `count` examples are next: each once, in another order every time."""
        places = (divmod(place, count) for place in range(self.step * size, (self.step + 1) * size))
        return [self._order(round_, count)[at] for round_, at in places]

    def _order(self, round_: int, count: int) -> list[int]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self._seed("order", round_))).tolist()

    def _seed(self, what: str, number: int) -> int:
        digest = hashlib.sha256(f"{self.plan.seed} {what} {number}".encode()).digest()
        return int.from_bytes(digest[:6], "big")

    def advance(self, losses: Sequence[Callable[[], torch.Tensor]]) -> float:
        """One step by the mean of these losses, each of which is gone before the next is asked for.

        Raises:
            GraftError: it is no number; nothing has been changed by this step.
        """
        try:
            total = self._way_back(losses)
        except RuntimeError as error:
            if self._mutates or _WRITTEN_TO not in str(error):
                raise
            self._mutates = True
            total = self._way_back(losses)
        norm = nn.utils.clip_grad_norm_(self.parameters, LONGEST_GRADIENT)
        if not torch.isfinite(norm):
            raise GraftError(f"the gradient is no number in step {self.step + 1}: make learning_rate smaller")
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(total)
        return total

    def _way_back(self, losses: Sequence[Callable[[], torch.Tensor]]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for loss_of in losses:
            with _copies_kept() if self._mutates else contextlib.nullcontext():
                loss = loss_of() / len(losses)
                total += float(loss.detach())
                if not math.isfinite(total):
                    raise GraftError(f"the loss is no number in step {self.step + 1}: make learning_rate smaller")
                loss.backward()
        return total

    def save(self, path: str | os.PathLike[str], of: str) -> None:
        """Write all that it takes to go on as if nothing had happened.

        Args:
            of: what tells the file of the LoRA that this belongs to.
        """
        named = self.training.named()
        names, tensors = list(named), {f"learner {name}": value.detach() for name, value in named.items()}
        plain: dict[str, dict[str, Any]] = {}
        for index, held in self.optimizer.state_dict()["state"].items():
            for field, value in held.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{field} {names[index]}"] = value
                else:
                    plain.setdefault(names[index], {})[field] = value
        about = {"of": of, "step": self.step, "losses": self.losses, "optimizer": self.plan.optimizer, "state": plain}
        write_tensors(Path(path), tensors, {"graft.training": json.dumps(about)})

    def load(self, path: str | os.PathLike[str], of: str) -> bool:
        """Go on from where a run was saved; False where that was another one, with nothing changed."""
        read = _read_state(path)
        if read is None:
            return False
        tensors, about = read
        own = self.training.named()
        shapes = {f"learner {name}": value.shape for name, value in own.items()}
        found = {name: value.shape for name, value in tensors.items() if name.startswith("learner ")}
        if about.get("of") != of or about.get("optimizer") != self.plan.optimizer or found != shapes:
            return False
        places = {name: index for index, name in enumerate(own)}
        state: dict[int, dict[str, Any]] = {places[name]: dict(held) for name, held in about["state"].items()}
        for key, value in tensors.items():
            field, _, name = key.partition(" ")
            if field == "learner":
                with torch.no_grad():
                    own[name].copy_(value)
            else:
                state.setdefault(places[name], {})[field] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step, self.losses = int(about["step"]), list(about["losses"])
        return True


def _read_state(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    if not os.path.isfile(path):
        return None
    try:
        with safe_open(os.fspath(path), framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["graft.training"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, about  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


__all__ = ["SCHEDULES", "Plan", "Run", "Training", "optimizers"]
