"""Ten classes of drawn shapes: images that need no download."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cifar_dist.data.sources.source import Item, Source
from cifar_dist.errors import UserError

SHAPES = ["circle", "cross", "diamond", "frame", "grid", "ring", "square", "star", "stripes", "triangle"]


def shapes(num_train: int = 1000, num_test: int = 500, seed: int = 0) -> Source:
    """Returns ten classes of drawn 32-px images, determined by the seed. Needs no network."""
    if min(num_train, num_test) < 2 * len(SHAPES):
        raise UserError(f"--num-train and --num-test must be {2 * len(SHAPES)} or more, two images per class")

    def items(split: str, count: int, key: int) -> list[Item]:
        return [
            Item(f"{split}-{i:05d}.png", i % len(SHAPES), partial(draw_shape, i % len(SHAPES), (seed, key, i)))
            for i in range(count)
        ]

    splits = {"train": items("train", num_train, 0), "test": items("test", num_test, 1)}
    return Source.of("shapes", SHAPES, splits, identity=f"shapes {seed}")


def draw_shape(label: int, key: tuple[int, ...], size: int = 32) -> np.ndarray:
    """Returns uint8 [size, size, 3]: the shape in random colour, place and size on a noisy background."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    scale = 4  # drawn larger and then reduced, for smooth edges
    ground = random.integers(0, 120, 3)
    colour = tuple(int(c) for c in (ground + random.integers(90, 136, 3)))
    image = Image.new("RGB", (size * scale, size * scale), tuple(int(c) for c in ground))
    radius = random.uniform(0.28, 0.42) * size * scale
    x, y = (random.uniform(radius, size * scale - radius) for _ in range(2))
    DRAW[SHAPES[label]](ImageDraw.Draw(image), Place(x, y, radius), colour)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(np.int64)
    return (pixels + random.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)


Colour = tuple[int, ...]


class Place(NamedTuple):
    """Where a shape is drawn: its centre and its radius in pixels."""

    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius

    @property
    def line_width(self) -> int:
        return max(int(self.radius / 4), 1)

    def polygon(self, corners: int, turn: float = 0.0, inner: float = 1.0) -> list[tuple[float, float]]:
        """Returns the corners of a regular polygon. Every second corner is at `inner` times the radius."""
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        reach = self.radius * np.where(np.arange(corners) % 2, inner, 1.0)
        turns = zip(angles, reach, strict=True)
        return [(float(self.x + r * np.sin(a)), float(self.y - r * np.cos(a))) for a, r in turns]


def cross(draw: ImageDraw.ImageDraw, at: Place, colour: Colour) -> None:
    draw.rectangle((at.x - at.radius, at.y - at.line_width, at.x + at.radius, at.y + at.line_width), fill=colour)
    draw.rectangle((at.x - at.line_width, at.y - at.radius, at.x + at.line_width, at.y + at.radius), fill=colour)


def grid(draw: ImageDraw.ImageDraw, at: Place, colour: Colour) -> None:
    for step in np.linspace(-at.radius, at.radius, 4):
        ends = (at.x + step, at.y - at.radius, at.x + step, at.y + at.radius)
        draw.line(ends, fill=colour, width=at.line_width // 2)
        ends = (at.x - at.radius, at.y + step, at.x + at.radius, at.y + step)
        draw.line(ends, fill=colour, width=at.line_width // 2)


def stripes(draw: ImageDraw.ImageDraw, at: Place, colour: Colour) -> None:
    for step in np.linspace(-at.radius, at.radius, 4):
        ends = (at.x - at.radius, at.y + step, at.x + at.radius, at.y + step)
        draw.line(ends, fill=colour, width=at.line_width)


DRAW: dict[str, Callable[[ImageDraw.ImageDraw, Place, Colour], None]] = {
    "circle": lambda draw, at, colour: draw.ellipse(at.box, fill=colour),
    "cross": cross,
    "diamond": lambda draw, at, colour: draw.polygon(at.polygon(4), fill=colour),
    "frame": lambda draw, at, colour: draw.rectangle(at.box, outline=colour, width=at.line_width),
    "grid": grid,
    "ring": lambda draw, at, colour: draw.ellipse(at.box, outline=colour, width=at.line_width),
    "square": lambda draw, at, colour: draw.rectangle(at.box, fill=colour),
    "star": lambda draw, at, colour: draw.polygon(at.polygon(10, inner=0.4), fill=colour),
    "stripes": stripes,
    "triangle": lambda draw, at, colour: draw.polygon(at.polygon(3), fill=colour),
}
