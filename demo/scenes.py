"""Procedural pictures: one to three coloured shapes on a coloured ground, in several styles.

A scene is drawn from signed distances (pixels; negative inside a shape), so that every style, filled or
outlined, comes out anti-aliased from the same geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 128  # pixels on a side
Array = np.ndarray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 56, 52),
    "orange": (245, 140, 40),
    "yellow": (250, 208, 60),
    "green": (66, 168, 84),
    "teal": (38, 178, 178),
    "blue": (52, 104, 214),
    "purple": (138, 72, 190),
    "pink": (240, 122, 172),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "cream": (250, 240, 216),
    "sky": (190, 222, 246),
    "mint": (196, 236, 208),
    "rose": (250, 214, 216),
    "lilac": (222, 210, 244),
    "sand": (226, 202, 164),
}
PLACES: dict[int, tuple[tuple[float, float], ...]] = {  # where 1, 2 or 3 shapes stand, in parts of the side
    1: ((0.50, 0.50),),
    2: ((0.29, 0.50), (0.71, 0.50)),
    3: ((0.29, 0.30), (0.71, 0.30), (0.50, 0.71)),
}
RADIUS = {1: 0.30, 2: 0.19, 3: 0.165}


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _fold(x: Array, y: Array, sectors: int) -> tuple[Array, Array]:
    """Map the plane into half a sector around the upward axis: (along it, beside it)."""
    angle = np.arctan2(x, -y)
    width = 2 * math.pi / sectors
    angle = np.abs((angle + width / 2) % width - width / 2)
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.sin(angle)


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.7, 0.7) - 0.1


def _segment(x: Array, y: Array, end_x: float, end_y: float) -> Array:
    """Distance to the line from the origin to an end."""
    part = np.clip((x * end_x + y * end_y) / (end_x**2 + end_y**2), 0, 1)
    return np.hypot(x - part * end_x, y - part * end_y)


def _points(x: Array, y: Array, count: int, inner: float) -> Array:
    """A star with `count` tips at 1.1 and notches at `inner`: by symmetry half an edge is the whole outline."""
    along, beside = _fold(x, y, count)
    edge = inner * math.cos(math.pi / count) - 1.1, inner * math.sin(math.pi / count)  # from the tip to the notch
    outside = (along - 1.1) * edge[1] - beside * edge[0]
    return np.copysign(_segment(along - 1.1, beside, *edge), outside)


def _triangle(x: Array, y: Array) -> Array:
    return _points(x, y - 0.15, 3, 0.55)


def _star(x: Array, y: Array) -> Array:
    return _points(x, y, 5, 0.5)


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner, with half a disc on each of its upper sides."""
    corner = 0.78
    x, y = np.abs(x), y - 0.08
    lobe_x, lobe_y = x - corner / 2, y + corner / 2
    from_lobe = np.hypot(lobe_x, lobe_y) - corner / math.sqrt(2)
    arc = np.where(lobe_x > lobe_y, np.abs(from_lobe), np.hypot(x, y + corner))
    outside = np.minimum(from_lobe, x + np.abs(y) - corner)
    return np.copysign(np.minimum(arc, _segment(x, y - corner, corner, -corner)), outside)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.68) - 0.27


def _moon(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 1.0, 0.78 - np.hypot(x - 0.5, y + 0.22))


def _flower(x: Array, y: Array) -> Array:
    along, beside = _fold(x, y, 5)
    return np.minimum(np.hypot(along - 0.62, beside) - 0.4, np.hypot(x, y) - 0.45)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "heart": _heart, "ring": _ring, "moon": _moon, "flower": _flower,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in its place; centre and radius in pixels, turn in radians."""

    colour: str
    shape: str
    centre: tuple[float, float]
    radius: float
    turn: float

    def distance(self, dx: float = 0.0, dy: float = 0.0) -> Array:
        """Signed distance ``[SIZE, SIZE]`` to the outline, shifted by (dx, dy)."""
        x, y = self.local(dx, dy)
        return SHAPES[self.shape](x, y) * self.radius

    def local(self, dx: float = 0.0, dy: float = 0.0) -> tuple[Array, Array]:
        """Pixel centres in the shape's own frame, where its radius is about 1."""
        rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
        x, y = (columns - self.centre[0] - dx) / self.radius, (rows - self.centre[1] - dy) / self.radius
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return x * cos + y * sin, y * cos - x * sin


@dataclass(frozen=True, slots=True)
class Scene:
    ground: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """In words, e.g. ``a red star and a blue ring on mint``."""
        return " and ".join(f"a {t.colour} {t.shape}" for t in self.things) + f" on {self.ground}"


def random_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.35, 0.3]))
    return Scene(str(rng.choice(list(GROUNDS))), tuple(_random_thing(rng, count, i) for i in range(count)))


def _random_thing(rng: np.random.Generator, count: int, index: int) -> Thing:
    jitter = 0.02 if count == 1 else 0.015
    x, y = (SIZE * (at + rng.uniform(-jitter, jitter)) for at in PLACES[count][index])
    return Thing(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(list(SHAPES))),
        centre=(x, y),
        radius=SIZE * RADIUS[count] * rng.uniform(0.95, 1.05),
        turn=rng.uniform(-0.12, 0.12),
    )


def _colour(table: dict[str, tuple[int, int, int]], name: str) -> Array:
    return np.array(table[name], np.float32) / 255


def _cover(distance: Array, softness: float = 1.0) -> Array:
    """How much of each pixel lies inside, ``[SIZE, SIZE, 1]``."""
    return np.clip(0.5 - distance / softness, 0, 1)[..., None]


def _line(distance: Array, width: float) -> Array:
    return _cover(np.abs(distance) - width / 2)


def _ramp() -> Array:
    return np.linspace(-1, 1, SIZE, dtype=np.float32)[:, None, None]  # -1 at the top


def draw_toy(scene: Scene) -> Array:
    """The base style: softly lit shapes with a shadow on a plain ground."""
    image = np.broadcast_to(_colour(GROUNDS, scene.ground) * (1 - 0.05 * _ramp()), (SIZE, SIZE, 3))
    for thing in scene.things:
        shadow = 0.3 / (1 + np.exp(thing.distance(3, 7) / 3))[..., None]
        image = image * (1 - shadow)
        x, y = thing.local()
        light = 1 - 0.16 * np.clip(x * 0.5 + y, -1.5, 1.5)[..., None]
        cover = _cover(thing.distance())
        image = image * (1 - cover) + _colour(COLOURS, thing.colour) * light * cover
    return np.clip(image, 0, 1)


def draw_neon(scene: Scene) -> Array:
    """Glowing tubes on a night wall that keeps a hint of the ground's hue."""
    image = np.array([0.03, 0.02, 0.09], np.float32) + 0.07 * _colour(GROUNDS, scene.ground) * (0.5 - 0.5 * _ramp())
    image = np.broadcast_to(image, (SIZE, SIZE, 3))
    for thing in scene.things:
        away = np.abs(thing.distance())[..., None]
        hue = _colour(COLOURS, thing.colour)
        hue = hue / hue.max()
        glow = 0.7 * np.exp(-away / 8) * hue
        tube = np.exp(-((away / 2.6) ** 2)) * (0.45 * hue + 0.55)
        image = 1 - (1 - image) * (1 - np.clip(glow, 0, 1)) * (1 - np.clip(tube, 0, 1))
    return np.clip(image, 0, 1)


def draw_blueprint(scene: Scene) -> Array:
    """White outlines with centre marks on gridded blue paper; colours are lost."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    grid = (np.minimum(abs(rows % 16 - 8), abs(columns % 16 - 8)) < 1)[..., None] * np.float32(0.14)
    paper = np.array([0.10, 0.27, 0.58], np.float32) * (1 - 0.08 * _ramp())
    image = paper * (1 - grid) + grid
    white = np.array([0.94, 0.97, 1.0], np.float32)
    for thing in scene.things:
        inside = _cover(thing.distance())
        image = image * (1 - 0.22 * inside) + white * 0.22 * inside
        ink = _line(thing.distance(), 3.6)
        image = image * (1 - ink) + white * ink
    return np.clip(image, 0, 1)


def draw_linocut(scene: Scene) -> Array:
    """Two inks on paper: black shapes with carved stripes, a coloured off-register block behind."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    image = np.broadcast_to(np.array([0.95, 0.92, 0.84], np.float32), (SIZE, SIZE, 3))
    for thing in scene.things:
        block = _cover(thing.distance(6.0, 6.0))
        image = image * (1 - block) + _colour(COLOURS, thing.colour) * block
    for thing in scene.things:
        distance = thing.distance()
        carved = _cover(np.abs((rows + columns + 0.0) % 16 - 8) - 2.4, 2) * _cover(distance + 5)
        ink = _cover(distance) * (1 - carved)
        image = image * (1 - ink) + np.array([0.10, 0.09, 0.10], np.float32) * ink
    return np.clip(image, 0, 1)


STYLES: dict[str, Callable[[Scene], Array]] = {
    "toy": draw_toy, "neon": draw_neon, "blueprint": draw_blueprint, "linocut": draw_linocut,
}  # fmt: skip


def draw(scenes: list[Scene], style: str) -> Array:
    """Pictures ``float32 [n, SIZE, SIZE, 3]`` in 0..1."""
    return np.stack([STYLES[style](scene) for scene in scenes]).astype(np.float32)


def draw_scenes(style: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures ``fp32 [count, SIZE, SIZE, 3]`` in 0..1 of random scenes, and their captions."""
    rng = np.random.default_rng(seed)
    drawn = [random_scene(rng) for _ in range(count)]
    return torch.from_numpy(draw(drawn, style)), [scene.caption for scene in drawn]
