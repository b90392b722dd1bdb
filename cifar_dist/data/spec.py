"""What a model wants of its images; apart from the pipeline, since to load DALI takes seconds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    """What the model wants: float32 [n, 3, image_size, image_size], in `input_range`, NHWC in memory or not.

    With `crop` images are shifted by the crop's corner; a `cutout_size` above 0 cuts a square of so many pixels out.
    """

    image_size: int
    input_range: str
    channels_last: bool
    crop: bool = False
    cutout_size: int = 0
