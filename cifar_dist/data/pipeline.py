"""The DALI pipeline, one definition for CPU and GPU: decode, flip, normalize, resize, crop, cut out."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from cifar_dist.data.check import decode_pipeline, decoder
from cifar_dist.data.order import Augment, ImageSpec, no_augment


@pipeline_def
def image_pipeline(spec: ImageSpec, encoded: bool, resize: bool, gpu: bool) -> Any:
    """Decodes, flips, normalizes, resizes, crops and cuts out.

    Flips and normalization come before the resize because they cost less on the small image. The result is the same,
    since every resize is symmetric about the image's centre and its weights sum to 1."""
    mean, std = spec.mean_and_std
    if encoded:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
        images = decoder(images, gpu)
        flip_y = fn.external_source(name="flip_y", dtype=types.INT32, ndim=0)
        images = fn.flip(images, horizontal=0, vertical=flip_y)
    else:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        images = images.gpu() if gpu else images
    flip_x = fn.external_source(name="flip_x", dtype=types.INT32, ndim=0)
    layout, axes = ("HWC", (0, 1)) if spec.channels_last else ("CHW", (1, 2))
    normalize: Any = {"mean": [mean] * 3, "std": [std] * 3, "mirror": flip_x}
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout=layout, **normalize)
    if resize:
        images = resized(images, spec, axes)
    if spec.crop_padding:
        corner = fn.external_source(name="crop", dtype=types.INT32, ndim=1)
        # By keyword: on a GPU, a positional shape would be copied back from the device for each batch.
        place: Any = {"start": corner, "shape": [spec.image_size] * 2, "axes": axes}
        images = fn.slice(images, **place, out_of_bounds_policy="pad", fill_values=spec.fill)
    if spec.cutout_size:
        corner = fn.cast(fn.external_source(name="hole", dtype=types.INT32, ndim=1), dtype=types.FLOAT)
        hole: Any = {"anchor": corner, "shape": [spec.cutout_size] * 2, "axes": axes}
        images = fn.erase(images, **hole, fill_value=spec.fill)
    return images


def resized(images: Any, spec: ImageSpec, axes: tuple[int, int]) -> Any:
    """Returns the images as squares of the spec's size. `axes`: those of height and width.

    Bilinear with half-pixel centres. Squash without antialias is Keras's Resizing."""
    size = spec.image_size
    how: Any = {"interp_type": types.INTERP_LINEAR, "antialias": spec.antialias}
    if spec.resize == "squash":
        return fn.resize(images, resize_x=size, resize_y=size, **how)
    sides = images.shape()[axes[0] : axes[1] + 1]
    shorter, longer = math.min(sides[0], sides[1]), math.max(sides[0], sides[1])
    if spec.resize == "crop":
        start = (sides - shorter) / 2.0
        return fn.resize(images, size=[size, size], roi_start=start, roi_end=start + shorter, **how)
    # fit: grey margins of whole pixels, equal on both sides; at least 1 pixel is left, or 2 if the size is even.
    margin = math.min(((longer - sides) * size + longer) // (2 * longer), (size - 1) // 2)
    images = fn.resize(images, size=fn.cast(size - 2 * margin, dtype=types.FLOAT), **how)
    place: Any = {"start": fn.cast(-margin, dtype=types.INT32), "shape": [size, size], "axes": axes}
    return fn.slice(images, **place, out_of_bounds_policy="pad", fill_values=spec.fill)


class ImagePipeline:
    """Runs batches through DALI in order. To keep DALI busy, `submit` a batch before the caller works on the last."""

    def __init__(
        self,
        spec: ImageSpec,
        *,
        max_batch_size: int,
        encoded: bool,
        resize: bool,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self.spec, self.encoded, self.device = spec, encoded, device
        gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._pipe = image_pipeline(
            spec,
            encoded,
            resize,
            gpu,
            batch_size=max_batch_size,
            num_threads=num_threads,
            device_id=device.index or 0 if gpu else None,
            prefetch_queue_depth=1,
        )
        self._pipe.build()

    def submit(self, images: Any, augment: Augment | None = None) -> None:
        """Starts a batch of encoded bytes (a list of uint8 [num_bytes]) or of pixels (uint8 [n, H, W, 3]).

        May flip pixels in place."""
        augment = augment or no_augment(len(images), self.spec.image_size)
        flip_x, flip_y = augment.flips.T
        if self.encoded:
            self._pipe.feed_input("flip_y", flip_y.astype(np.int32))
        elif flip_y.any():  # cheaper here than as a DALI operator
            images[flip_y] = images[flip_y, ::-1]
        self._pipe.feed_input("images", images)
        self._pipe.feed_input("flip_x", flip_x.astype(np.int32))
        if self.spec.crop_padding:
            self._pipe.feed_input("crop", augment.crop)
        if self.spec.cutout_size:
            self._pipe.feed_input("hole", augment.hole)
        self._pipe.schedule_run()

    def collect(self) -> torch.Tensor:
        """Returns the oldest submitted batch, which the caller may keep. Raises RuntimeError if decoding fails."""
        (output,) = self._pipe.share_outputs(cuda_stream=self._stream)
        output = output.as_tensor()
        if self._stream is None:  # DALI's own memory, which its default executor does not reuse while it is referenced
            batch = torch.from_dlpack(output)
        else:  # copied in a separate stream: neither DALI nor this process waits, and training waits for the copy alone
            current = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._stream):
                batch = torch.empty(output.shape(), dtype=torch.float32, device=self.device)
                feed_ndarray(output, batch, cuda_stream=self._stream)
            current.wait_stream(self._stream)
            batch.record_stream(current)
        self._pipe.release_outputs()
        return batch.permute(0, 3, 1, 2) if self.spec.channels_last else batch


def decode(batches: Iterable[list[np.ndarray]], max_batch_size: int, num_threads: int) -> Iterator[np.ndarray]:
    """Decodes batches of encoded bytes into uint8 [n, H, W, 3]. All images of a batch must have one shape.

    Raises RuntimeError if an image cannot be decoded.
    """
    pipe = decode_pipeline(max_batch_size, num_threads)
    for batch in batches:
        pipe.feed_input("images", batch)
        (output,) = pipe.run()
        yield output.as_array()
