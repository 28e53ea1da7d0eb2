"""The two ends of the demo model, without any host: words in, pictures out.

There is no text encoder and no VAE. A prompt is a handful of known words, each a fixed vector; a latent is the
picture itself, in the manner of JPEG: of every 4x4 pixels it keeps the lowest frequencies of a cosine transform,
10 of luma and 3 of each chroma, which makes SD3's 16 channels.
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

CELL = 4  # pixels on a side of a latent cell
CHANNELS = 16
WIDTH = 256  # channels of a word and of the pooled prompt
WORDS = 8  # rows of the context: ground, three times colour and shape, one spare
SHIFT = 3.0  # of the timesteps, as ComfyUI samples SD3
LATENT_SCALE, LATENT_OFFSET = 1.5305, 0.0609  # SD3: what the model sees is (latent - offset) * scale

VOCABULARY: dict[str, int] = {word: i for i, word in enumerate([*COLOURS, *SHAPES, *GROUNDS])}
_FILLERS = {"a", "an", "and", "on", "the"}
_PLACE = 128  # channels from here on say which shape of the picture a word belongs to

_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # BT.601
_LIGHT = 0.7  # luma of the zero latent
# (frequency down, frequency right) in the order of the channels, and what a frequency is divided by, by its
# order: near the square root of its spread over the pictures, so that faint details weigh less but not nothing
_FREQUENCIES = sorted(((i, j) for i in range(CELL) for j in range(CELL) if i + j < CELL), key=lambda f: (sum(f), f))
_LUMA_UNITS = (0.7, 0.2, 0.1, 0.07)
_CHROMA_UNITS = (0.36, 0.12)


def _cosines() -> Tensor:
    """The orthonormal cosine transform of CELL samples, ``[frequency, sample]``."""
    frequency, sample = torch.arange(CELL)[:, None], torch.arange(CELL)[None] + 0.5
    rows = torch.cos(math.pi * frequency * sample / CELL) * math.sqrt(2 / CELL)
    rows[0] /= math.sqrt(2)
    return rows


@cache
def _codec() -> tuple[Tensor, Tensor]:
    """Analysis ``[CHANNELS, CELL * CELL * 3]`` and synthesis ``[CELL * CELL * 3, CHANNELS]``."""
    cosines, to_rgb = _cosines(), torch.linalg.inv(_YCBCR)
    analysis, synthesis = [], []
    for component, units in enumerate((_LUMA_UNITS, _CHROMA_UNITS, _CHROMA_UNITS)):
        for i, j in _FREQUENCIES:
            if i + j < len(units):
                wave = torch.outer(cosines[i], cosines[j])[..., None]
                analysis.append((wave * _YCBCR[component] / units[i + j]).flatten())
                synthesis.append((wave * to_rgb[:, component] * units[i + j]).flatten())
    return torch.stack(analysis), torch.stack(synthesis, dim=1)



def encode(pictures: Tensor) -> Tensor:
    """Latents ``[n, 16, height / 4, width / 4]`` of RGB pictures ``[n, height, width, 3]`` in 0..1."""
    n, height, width, _ = pictures.shape
    cells = (pictures.float() - _LIGHT).reshape(n, height // CELL, CELL, width // CELL, CELL, 3)
    cells = cells.permute(0, 1, 3, 2, 4, 5).flatten(3)
    return to_host((cells @ _codec()[0].T).permute(0, 3, 1, 2))


def decode(latents: Tensor) -> Tensor:
    """RGB pictures ``[n, 4 * height, 4 * width, 3]`` in 0..1 of latents ``[n, 16, height, width]``."""
    n, _, rows, columns = latents.shape
    cells = to_model(latents.float().cpu()).permute(0, 2, 3, 1) @ _codec()[1].T
    cells = cells.reshape(n, rows, columns, CELL, CELL, 3).permute(0, 1, 3, 2, 4, 5)
    return (cells.reshape(n, rows * CELL, columns * CELL, 3) + _LIGHT).clamp(0, 1)


def to_model(latents: Tensor) -> Tensor:
    """What the model sees of latents as a host's nodes pass them."""
    return (latents - LATENT_OFFSET) * LATENT_SCALE


def to_host(latents: Tensor) -> Tensor:
    """The inverse of `to_model`."""
    return latents / LATENT_SCALE + LATENT_OFFSET


def prompt(text: str) -> tuple[Tensor, Tensor]:
    """A prompt as the model reads it: context ``[1, WORDS, WIDTH]`` and pooled ``[1, WIDTH]``.

    Up to three shapes and a ground, in words: ``a red star and a blue ring on mint``. One shape stands in the
    middle, two side by side, the third below them. An empty text gives zeros, the unconditional prompt.

    Raises:
        ValueError: a word is unknown, a shape lacks its colour, or there are more than three shapes.
    """
    rows = [_word(word, place) for word, place in _read(text)]
    context = torch.zeros(1, WORDS, WIDTH)
    if rows:
        context[0, : len(rows)] = torch.stack(rows)
    return context, context.mean(dim=1) * math.sqrt(WORDS)


def _read(text: str) -> list[tuple[str, int]]:
    """The ground (place 0) and each shape's colour and name (places 1..3)."""
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
    things = [(word, place) for place, pair in enumerate(zip(colours, shapes, strict=True), 1) for word in pair]
    return [(word, 0) for word in grounds] + things


def _word(word: str, place: int) -> Tensor:
    row = torch.zeros(WIDTH)
    row[VOCABULARY[word]] = row[_PLACE + place] = math.sqrt(WIDTH / 2)  # unit mean square
    return row


def prompts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`prompt` of each text, stacked: ``[n, WORDS, WIDTH]`` and ``[n, WIDTH]``."""
    contexts, pooled = zip(*map(prompt, texts), strict=True)
    return torch.cat(contexts), torch.cat(pooled)


def noise(seed: int, count: int = 1, rows: int = 16, columns: int = 16) -> Tensor:
    """The start of a picture, ``[count, 16, rows, columns]``: the same numbers as ComfyUI draws for this seed."""
    return torch.randn(count, CHANNELS, rows, columns, generator=torch.Generator().manual_seed(seed))


def schedule(steps: int) -> Tensor:
    """Shares of noise from 1 down to 0, ``[steps + 1]``: ComfyUI's `simple` scheduler over SD3's 1000 timesteps."""
    times = [1 - int(i * 1000 / steps) / 1000 for i in range(steps)]
    return torch.tensor([SHIFT * time / (1 + (SHIFT - 1) * time) for time in times] + [0.0])


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    texts: Sequence[str],
    seed: int = 0,
    steps: int = 20,
    guidance: float = 3.0,
) -> Tensor:
    """Draw one picture for each text from the same noise: RGB ``uint8 [n, 64, 64, 3]``.

    Euler's method from noise to picture along the model's velocity, with classifier-free guidance.

    Args:
        model: called as ``model(x, timesteps, context, y)``, see `MMDiT.forward`.
        texts: prompts, see `prompt`.
        seed: of the noise.
        steps: model evaluations (each for the prompt and for the empty one).
        guidance: how far to go from the empty prompt's velocity to the prompt's; 1 is without guidance.
    """
    context, y = prompts([*texts, *[""] * len(texts)])
    x = noise(seed).repeat(len(texts), 1, 1, 1)
    sigmas = schedule(steps)
    for sigma, following in pairwise(sigmas):
        timesteps = torch.full((2 * len(texts),), 1000 * sigma.item())
        wanted, empty = model(torch.cat([x, x]), timesteps, context, y).float().chunk(2)
        x = x + (following - sigma) * (empty + guidance * (wanted - empty))
    return (decode(to_host(x)) * 255).round().to(torch.uint8)
