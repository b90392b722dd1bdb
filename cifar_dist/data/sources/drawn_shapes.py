"""Ten classes of drawn shapes: images that need no download."""

from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from cifar_dist.data.sources.picture import Item
from cifar_dist.data.sources.source import Source
from cifar_dist.errors import UserError

SHAPES = ["circle", "cross", "diamond", "frame", "grid", "ring", "square", "star", "stripes", "triangle"]


def shapes(num_train: int = 1000, num_test: int = 500, seed: int = 0) -> Source:
    """Ten classes of drawn 32-px images, made from the seed: data that needs no network."""
    if min(num_train, num_test) < 2 * len(SHAPES):
        raise UserError(f"--num-train and --num-test must be {2 * len(SHAPES)} or more, two images per class")

    def items(split: str, count: int, key: int) -> list[Item]:
        return [
            Item(f"{split}-{i:05d}.png", i % len(SHAPES), partial(draw_shape, i % len(SHAPES), (seed, key, i)))
            for i in range(count)
        ]

    return Source("shapes", SHAPES, {"train": items("train", num_train, 0), "test": items("test", num_test, 1)})


def draw_shape(label: int, key: tuple[int, ...], size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3]: the shape in a random colour, place and size on a noisy ground of another colour."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    scale = 4  # drawn larger and reduced, for smooth edges
    ground = random.integers(0, 120, 3)
    colour = tuple(int(c) for c in (ground + random.integers(90, 136, 3)))
    image = Image.new("RGB", (size * scale, size * scale), tuple(int(c) for c in ground))
    draw = ImageDraw.Draw(image)
    radius = random.uniform(0.28, 0.42) * size * scale
    x, y = (random.uniform(radius, size * scale - radius) for _ in range(2))
    box, width = (x - radius, y - radius, x + radius, y + radius), max(int(radius / 4), 1)

    def polygon(corners: int, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        reach = radius * np.where(np.arange(corners) % 2, inner, 1.0)
        return [(float(x + r * np.sin(a)), float(y - r * np.cos(a))) for a, r in zip(angles, reach, strict=True)]

    match SHAPES[label]:
        case "circle":
            draw.ellipse(box, fill=colour)
        case "cross":
            draw.rectangle((x - radius, y - width, x + radius, y + width), fill=colour)
            draw.rectangle((x - width, y - radius, x + width, y + radius), fill=colour)
        case "diamond":
            draw.polygon(polygon(4, 0.0), fill=colour)
        case "frame":
            draw.rectangle(box, outline=colour, width=width)
        case "grid":
            for step in np.linspace(-radius, radius, 4):
                draw.line((x + step, y - radius, x + step, y + radius), fill=colour, width=width // 2)
                draw.line((x - radius, y + step, x + radius, y + step), fill=colour, width=width // 2)
        case "ring":
            draw.ellipse(box, outline=colour, width=width)
        case "square":
            draw.rectangle(box, fill=colour)
        case "star":
            draw.polygon(polygon(10, 0.0, inner=0.4), fill=colour)
        case "stripes":
            for step in np.linspace(-radius, radius, 4):
                draw.line((x - radius, y + step, x + radius, y + step), fill=colour, width=width)
        case "triangle":
            draw.polygon(polygon(3, 0.0), fill=colour)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(np.int64)
    return (pixels + random.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
