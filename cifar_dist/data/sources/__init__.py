"""The sources of images: CIFAR-10, folders, Parquet files, drawn shapes."""

from cifar_dist.data.sources.cifar10_files import cifar10
from cifar_dist.data.sources.drawn_shapes import SHAPES, draw_shape, shapes
from cifar_dist.data.sources.image_folders import image_folder
from cifar_dist.data.sources.parquet_files import parquet
from cifar_dist.data.sources.picture import DeepImages, Item, Row, encode_png
from cifar_dist.data.sources.source import Source

__all__ = [
    "SHAPES",
    "DeepImages",
    "Item",
    "Row",
    "Source",
    "cifar10",
    "draw_shape",
    "encode_png",
    "image_folder",
    "parquet",
    "shapes",
]
