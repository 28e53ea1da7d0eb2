"""The two ends of the demo model, without any host: words in, pictures out.

There is no text encoder and no VAE. A prompt is a handful of known words, each a fixed vector; a latent is the
picture itself, in the manner of JPEG: of every cell of 8x8 pixels it keeps the lowest frequencies of a cosine
transform, 10 of luma and 3 of each chroma, which makes Wan's 16 channels. So that nobody sees the cells, each
one's waves go on a little into its neighbours, where they are cross-faded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .scenes import COLOURS, GROUNDS, SHAPES

CELL = 8  # pixels on a side of a latent cell
WAVES = 4  # frequencies of a cell in each direction
FADE = 3  # pixels that a cell's waves reach into its neighbours
CHANNELS = 16
CELLS = 16  # on a side of the pictures that the model is trained on
WIDTH = 4096  # channels of a word
ROWS = 4  # of the context: the ground and up to three shapes
SHIFT = 3.0  # of the timesteps, see `schedule`

# Wan 2.1: what the model sees is (latent - mean) / spread
_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_SPREAD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # BT.601
_LIGHT = 0.75  # luma of the zero latent
# what a frequency is divided by, by its order: near its spread over the pictures
_LUMA_UNITS = (1.0, 0.3, 0.15, 0.1)
_CHROMA_UNITS = (0.6, 0.15)
_FREQUENCIES = sorted(((i, j) for i in range(WAVES) for j in range(WAVES) if i + j < WAVES), key=lambda f: (sum(f), f))
_LAYOUT = [  # of the channels: (component, frequency down, frequency right, unit)
    (component, i, j, units[i + j])
    for component, units in enumerate((_LUMA_UNITS, _CHROMA_UNITS, _CHROMA_UNITS))
    for i, j in _FREQUENCIES
    if i + j < len(units)
]

VOCABULARY: dict[str, int] = {word: i for i, word in enumerate([*COLOURS, *SHAPES, *GROUNDS])}
_FILLERS = {"a", "an", "and", "on", "the"}


@cache
def _synthesis(cells: int) -> Tensor:
    """The waves of a row of `cells` cells: ``[CELL * cells, WAVES * cells]`` in fp64.

    The cross-fades of neighbours add up to one, so a plain colour is one number a cell.
    """
    inside = torch.arange(CELL * cells).double()[:, None] + 0.5 - CELL * torch.arange(cells)  # [pixel, cell]
    fade = _rise(inside) * _rise(CELL - inside)
    fade[:CELL, 0] = _rise(CELL - inside[:CELL, 0])  # nothing to fade into beyond the margins
    fade[-CELL:, -1] = _rise(inside[-CELL:, -1]) if cells > 1 else 1.0
    wave = torch.arange(WAVES)
    size = torch.where(wave == 0, 1.0, math.sqrt(2)) / math.sqrt(CELL)
    return (fade[..., None] * size * torch.cos(math.pi / CELL * wave * inside[..., None])).flatten(1)


def _rise(distance: Tensor) -> Tensor:
    """From 0 at -FADE to 1 at FADE pixels inside."""
    return (math.pi / 4 * (1 + (distance / FADE).clamp(-1, 1))).sin().square()


@cache
def _analysis(cells: int) -> Tensor:
    """The least squares inverse of `_synthesis`: ``[WAVES * cells, CELL * cells]``."""
    return torch.linalg.pinv(_synthesis(cells))


def encode(pictures: Tensor) -> Tensor:
    """What the model sees ``[n, 16, 1, height / 8, width / 8]`` of RGB pictures ``[n, height, width, 3]`` in 0..1."""
    rows, columns = (size // CELL for size in pictures.shape[1:3])
    planes = ((pictures.float() - _LIGHT) @ _YCBCR.T).movedim(-1, 1)
    waves = _analysis(rows).float() @ planes @ _analysis(columns).float().T
    waves = waves.unflatten(3, (columns, WAVES)).unflatten(2, (rows, WAVES))  # [n, component, row, i, column, j]
    return torch.stack([waves[:, c, :, i, :, j] / unit for c, i, j, unit in _LAYOUT], dim=1)[:, :, None]


def decode(latents: Tensor) -> Tensor:
    """RGB pictures ``[n, 8 * rows, 8 * columns, 3]`` in 0..1 of what the model sees ``[n, 16, 1, rows, columns]``."""
    n, _, _, rows, columns = latents.shape
    waves = torch.zeros(n, 3, rows, WAVES, columns, WAVES)
    for channel, (component, i, j, unit) in enumerate(_LAYOUT):
        waves[:, component, :, i, :, j] = latents[:, channel, 0].float().cpu() * unit
    planes = _synthesis(rows).float() @ waves.flatten(4).flatten(2, 3) @ _synthesis(columns).float().T
    return (planes.movedim(1, -1) @ torch.linalg.inv(_YCBCR).T + _LIGHT).clamp(0, 1)


def to_model(latents: Tensor) -> Tensor:
    """What the model sees of latents as a host's nodes pass them."""
    mean, spread = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (_MEAN, _SPREAD))
    return (latents - mean) / spread


def to_host(latents: Tensor) -> Tensor:
    """The inverse of `to_model`."""
    mean, spread = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (_MEAN, _SPREAD))
    return latents * spread + mean


@cache
def places(rows: int = CELLS, columns: int = CELLS) -> Tensor:
    """Where each cell is: ``[1, 16, 1, rows, columns]``, laid beside the noisy latent.

    Wan's rotary positions only say how far two tokens are apart, which in pure noise leaves open where the
    middle is. These are cosines and sines of half a turn to four turns over the picture, down and right.
    """
    planes = []
    down, right = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    for axis in torch.meshgrid(down, right, indexing="ij"):
        for turns in (0.5, 1, 2, 4):
            planes += [torch.cos(2 * math.pi * turns * axis), torch.sin(2 * math.pi * turns * axis)]
    return torch.stack(planes)[None, :, None]


@cache
def _vectors() -> Tensor:
    """One vector of signs for each word and each place, ``[words + 6, WIDTH]``: nearly at right angles."""
    count = len(VOCABULARY) + 6
    return 2.0 * torch.randint(2, (count, WIDTH), generator=torch.Generator().manual_seed(0)) - 1


def prompt(text: str) -> Tensor:
    """A prompt as the model reads it: ``[1, ROWS, WIDTH]``.

    Up to three shapes and a ground, in words: ``a red star and a blue ring on mint``. One shape stands in the
    middle, two side by side, the third below them. The first row is the ground, each further one a shape: the
    mean of its colour, its name and its place. An empty text gives zeros, the unconditional prompt.

    Raises:
        ValueError: a word is unknown, a shape lacks its colour, or there are more than three shapes.
    """
    ground, things = _read(text)
    vectors, rows = _vectors(), torch.zeros(1, ROWS, WIDTH)
    if ground:
        rows[0, 0] = vectors[VOCABULARY[ground]]
    first = len(VOCABULARY) + len(things) * (len(things) - 1) // 2
    for index, (colour, shape) in enumerate(things):
        rows[0, 1 + index] = vectors[[VOCABULARY[colour], VOCABULARY[shape], first + index]].sum(0) / math.sqrt(3)
    return rows


def _read(text: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The ground, and each shape's colour and name."""
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word not in _FILLERS]
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        raise ValueError(f"the demo model does not know {', '.join(unknown)}: it knows {', '.join(VOCABULARY)}")
    grounds = [word for word in words if word in GROUNDS]
    rest = [word for word in words if word not in GROUNDS]
    colours, shapes = rest[::2], rest[1::2]
    paired = all(c in COLOURS for c in colours) and all(s in SHAPES for s in shapes) and len(colours) == len(shapes)
    if not paired or len(shapes) > 3 or len(grounds) > 1:
        raise ValueError(f"cannot read {text!r}: write like 'a red star and a blue ring on mint', three shapes at most")
    return grounds[0] if grounds else None, list(zip(colours, shapes, strict=True))


def prompts(texts: Sequence[str]) -> Tensor:
    """`prompt` of each text, stacked: ``[n, ROWS, WIDTH]``."""
    return torch.cat([prompt(text) for text in texts])


def noise(seed: int, count: int = 1, rows: int = CELLS, columns: int = CELLS) -> Tensor:
    """The start of a picture, ``[count, 16, 1, rows, columns]``: the same numbers as ComfyUI draws for this seed."""
    return torch.randn(count, CHANNELS, 1, rows, columns, generator=torch.Generator().manual_seed(seed))


def schedule(steps: int) -> Tensor:
    """Shares of noise from 1 down to 0, ``[steps + 1]``: ComfyUI's `simple` scheduler over 1000 timesteps."""
    times = [1 - int(i * 1000 / steps) / 1000 for i in range(steps)]
    return torch.tensor([SHIFT * time / (1 + (SHIFT - 1) * time) for time in times] + [0.0])


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    texts: Sequence[str],
    seed: int = 0,
    steps: int = 20,
    guidance: float = 3.0,
) -> Tensor:
    """Draw one picture for each text from the same noise: RGB ``[n, 128, 128, 3]`` in 0..1.

    Euler's method from noise to picture along the model's velocity, with classifier-free guidance.

    Args:
        model: called as ``model(x, timesteps, context)``, see `Wan.forward`.
        texts: prompts, see `prompt`.
        seed: of the noise.
        steps: model evaluations (each for the prompt and for the empty one).
        guidance: how far to go from the empty prompt's velocity to the prompt's; 1 is without guidance.
    """
    context = prompts([*texts, *[""] * len(texts)])
    x = noise(seed).repeat(len(texts), 1, 1, 1, 1)
    for sigma, following in pairwise(schedule(steps)):
        timesteps = torch.full((2 * len(texts),), 1000 * sigma.item())
        wanted, empty = model(beside_places(torch.cat([x, x])), timesteps, context).float().chunk(2)
        x = x + (following - sigma) * (empty + guidance * (wanted - empty))
    return decode(x)


def beside_places(x: Tensor) -> Tensor:
    """The model's input: `places` behind the channels of x ``[n, 16, 1, rows, columns]``."""
    return torch.cat([x, places(*x.shape[-2:]).expand(len(x), -1, -1, -1, -1)], dim=1)
