"""The sources of images: CIFAR-10, pictures and tables as people have them, drawn shapes."""

from cifar_dist.data.sources.cifar10_files import cifar10
from cifar_dist.data.sources.drawn_shapes import SHAPES, draw_shape, shapes
from cifar_dist.data.sources.found import find_source
from cifar_dist.data.sources.picture import Rules, encode_png
from cifar_dist.data.sources.source import Item, Source

__all__ = ["SHAPES", "Item", "Rules", "Source", "cifar10", "draw_shape", "encode_png", "find_source", "shapes"]
