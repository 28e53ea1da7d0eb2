"""What a host's code asks a layer for other than its product, and the layers that answer.

Models cast what goes in to the dtype of a layer's weight, read channels from its shape, or add rows of a table
themselves. Of a packed layer they would get bytes, of an F16 one a dtype that rounds what follows. Which layers are
so asked stands in the code of the model's own classes: it is read once when a model has been loaded, and those
layers hold the weights of an unquantized one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .layers import PackedLayer

log = logging.getLogger(__name__)

SHAPE, DTYPE, VALUE = "shape", "dtype", "value"

_SHAPES = ("shape", "ndim", "size", "numel", "dim")
_HARMLESS = ("device", "is_cuda", "is_meta", "requires_grad")
READS = re.compile(r"\.(weight|bias)\b|\.parameters\(")
"""What source code holds where it asks; most asks nothing."""

_NO_QUESTIONS = ("__init__", "load_sd", "enable_compat_mode", "weight", "bias")
"""Methods that run before the weights are there, and properties that hand a question on to a layer inside."""

Bindings = dict[str, list[tuple[ast.expr, bool]]]
"""What a method's local names stand for: an expression, or each element of it."""


@dataclass(frozen=True)
class Question:
    """A place where code reads a parameter of another module.

    Attributes:
        read: what is read, e.g. ``self.proj.weight`` or ``next(self.proj.parameters())``.
        kind: `SHAPE`, `DTYPE` or `VALUE`.
        line: of the source file.
        bindings: the local names where it stands.
    """

    read: ast.expr
    kind: str
    line: int
    bindings: Bindings = field(repr=False)

    def parameters(self, module: nn.Module) -> list[Any]:
        """What it reads where `module` is the one that asks."""
        return [] if self._is_given else list(_objects(self.read, module, self.bindings))

    @property
    def can_be_followed(self) -> bool:
        """Whether its layers can be told: by a way from the module that asks, or by a name in it."""
        return not self._is_given and _is_rooted(self.read, self.bindings)

    @property
    def _is_given(self) -> bool:
        """Whether it reads a layer that the method was given, of which nothing tells which it is."""
        owner = _owner_of_next(self.read)
        return _is_free(self.read.value if owner is None else owner, self.bindings)  # type: ignore[attr-defined]


def questions_in(code: ast.AST) -> list[Question]:
    """Every such place in a function, a class or a file."""
    parents = {child: node for node in ast.walk(code) for child in ast.iter_child_nodes(node)}
    bindings = _bindings(code)
    found = []
    for node in ast.walk(code):
        kind = _kind(node, parents)
        if kind is not None and isinstance(node, ast.expr):
            found.append(Question(node, kind, node.lineno, bindings))
    return found


def _kind(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str | None:
    """What a parameter is read for, or None if `node` is no such read or one that every layer answers."""
    is_next = isinstance(node, ast.Call) and _owner_of_next(node) is not None
    if not is_next:
        if not (isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load)):
            return None
        if _is_self(node.value):
            return None  # a module's own parameter, not a layer's
    parent = parents.get(node)
    if isinstance(parent, ast.Attribute):
        if parent.attr in _HARMLESS:
            return None
        if parent.attr in (*_SHAPES, "dtype"):
            return DTYPE if parent.attr == "dtype" else SHAPE
    if isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops):
        return None
    if isinstance(parent, ast.Call) and ".init." in f".{ast.unparse(parent.func)}":
        return None  # a first value, before there are weights
    return DTYPE if is_next else VALUE


def _owner_of_next(node: ast.AST) -> ast.expr | None:
    """The `x` of ``next(x.parameters())``."""
    if not _calls(node, "next"):
        return None
    inner = node.args[0].args[0] if _calls(node.args[0], "iter") else node.args[0]  # type: ignore[attr-defined]
    if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "parameters":
        return inner.func.value
    return None


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name and bool(node.args)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_free(node: ast.AST, bindings: Bindings) -> bool:
    """Whether a name comes from outside of the method."""
    return isinstance(node, ast.Name) and node.id != "self" and node.id not in bindings


def _bindings(code: ast.AST) -> Bindings:
    found: Bindings = {}

    def bind(target: ast.expr, value: ast.expr, elements: bool) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                found.setdefault(name.id, []).append((value, elements))

    for node in ast.walk(code):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            bind(node.targets[0], node.value, False)
        elif isinstance(node, ast.NamedExpr):
            bind(node.target, node.value, False)
        elif isinstance(node, (ast.For, ast.comprehension)):
            # through enumerate, zip and the like each name may be an element of each
            parts = node.iter.args if isinstance(node.iter, ast.Call) else [node.iter]
            for part in parts:
                bind(node.target, part, True)
    return found


def _objects(expression: ast.expr, module: nn.Module, bindings: Bindings, depth: int = 0) -> Iterator[Any]:
    """What an expression may stand for, of names, attributes and indices alone; nothing else is run."""
    if depth > 8:
        return

    def deeper(inner: ast.expr) -> Iterator[Any]:
        # something that the method was given may be any part of the module that has what is asked of it
        return module.modules() if _is_free(inner, bindings) else _objects(inner, module, bindings, depth + 1)

    owner = _owner_of_next(expression)
    if owner is not None:
        for found in deeper(owner):
            if isinstance(found, nn.Module):
                yield from itertools.islice(found.parameters(), 1)
    elif _is_self(expression):
        yield module
    elif isinstance(expression, ast.Name):
        for value, elements in bindings.get(expression.id, ()):
            for found in deeper(value):
                yield from _elements(found) if elements else (found,)
    elif isinstance(expression, ast.Attribute):
        for found in deeper(expression.value):
            try:
                yield getattr(found, expression.attr)
            except Exception:
                continue  # a variant of the model that lacks it, or a property that is not ready yet
    elif isinstance(expression, ast.Subscript):
        for found in deeper(expression.value):
            yield from _picked(found, expression.slice)


def _elements(container: Any) -> Iterable[Any]:
    if isinstance(container, nn.Module):
        return list(container.children())
    return container if isinstance(container, (list, tuple)) else ()


def _picked(container: Any, index: ast.expr) -> Iterable[Any]:
    """The element at an index that the source tells, or all where it is computed."""
    if not isinstance(index, (ast.Constant, ast.UnaryOp)):
        return _elements(container)
    try:
        return (container[ast.literal_eval(index)],)
    except Exception:
        return ()  # no container, or one without this index


def _is_rooted(expression: ast.expr, bindings: Bindings, depth: int = 0) -> bool:
    owner = _owner_of_next(expression)
    if owner is not None:
        return _is_rooted(owner, bindings, depth)
    if isinstance(expression, (ast.Attribute, ast.Subscript)):
        return _is_free(expression.value, bindings) or _is_rooted(expression.value, bindings, depth)
    if not isinstance(expression, ast.Name) or depth > 8:
        return False
    bound = bindings.get(expression.id, ())
    return _is_self(expression) or any(_is_rooted(value, bindings, depth + 1) for value, _ in bound)


@functools.cache
def methods_in(path: Path) -> dict[tuple[str, str], list[Question]]:
    """The questions of each method of a source file, by the qualified name of its class and its own."""
    found: dict[tuple[str, str], list[Question]] = {}
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()

    def asks(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a closer look, which takes longer, can find something."""
        return any(READS.search(line) for line in lines[method.lineno - 1 : method.end_lineno])

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if isinstance(node, ast.ClassDef) and child.name not in _NO_QUESTIONS and asks(child):
                    found[prefix.removesuffix("."), child.name] = questions_in(child)
                walk(child, f"{prefix}{child.name}.<locals>.")
            else:
                walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    walk(ast.parse(source), "")
    return {place: questions for place, questions in found.items() if questions}


def _questions_of(cls: type) -> list[tuple[str, Question]]:
    """What the methods of a class ask, with the name of each."""
    if cls.__module__.partition(".")[0] in ("torch", "builtins") or issubclass(cls, PackedLayer):
        return []
    try:
        by_method = methods_in(Path(inspect.getfile(cls)))
    except (TypeError, OSError, ValueError, SyntaxError) as error:
        # classes that are made while the program runs have no file, and their methods come from those that have
        log.debug("%s is not searched for reads of weights: %s", cls.__qualname__, error)
        return []
    return [(method, q) for (owner, method), found in by_method.items() if owner == cls.__qualname__ for q in found]


def asked_layers(model: nn.Module) -> dict[PackedLayer, set[str]]:
    """The layers of `model` whose weight or bias its code reads, and what for."""
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    owners = {id(held): layer for layer in layers for held in (layer.weight, layer.bias) if held is not None}
    questions: dict[type, list[tuple[str, Question]]] = {}
    found: dict[PackedLayer, set[str]] = {}
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls not in questions:
                questions[cls] = _questions_of(cls)
            for method, question in questions[cls]:
                if method in vars(module):
                    continue  # it has been replaced by one that asks the layer
                for held in question.parameters(module):
                    if id(held) in owners:
                        found.setdefault(owners[id(held)], set()).add(question.kind)
    return found


def answer_questions(model: nn.Module, dtype_of: Callable[[PackedLayer], torch.dtype]) -> None:
    """Let every layer that is asked hold the weights that the host would find in an unquantized one.

    A layer whose numbers are read becomes one of the host's own, which patches it as such: what runs beside a layer
    is not seen by who does not call it.

    Args:
        dtype_of: what an unquantized layer would hold its weight in.
    """
    for layer, kinds in asked_layers(model).items():
        if layer.fmt is None:
            continue
        dtype = dtype_of(layer)
        if kinds != {SHAPE}:
            layer.load_weight(layer.dequantized(dtype=dtype))
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        elif layer.fmt.is_quantized:
            layer.load_weight(layer.dequantized())
        if VALUE in kinds:
            own = next(base for base in type(layer).__mro__ if not issubclass(base, PackedLayer))
            layer.__class__ = own  # type: ignore[assignment]
            layer.is_read = True  # type: ignore[assignment]


__all__ = ["DTYPE", "SHAPE", "VALUE", "Question", "answer_questions", "asked_layers", "methods_in", "questions_in"]
