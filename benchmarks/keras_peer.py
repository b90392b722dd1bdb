# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0", "h5py>=3.11"]
# ///
"""Trains one of the deck's two networks in Keras on TensorFlow and prints images/s as JSON: a peer of peers.py.

The deck's own code (tests/parity/deck_keras.py): flips and the resize to 224 px are layers of the ResNet, fit() runs it
as a compiled graph. Images are decoded and in memory, which spares Keras what the others do; tf.data shuffles and
batches them ahead. Random weights.
Runs in an environment of its own (`uv run --script`), since the project itself does not need TensorFlow.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))

import deck_keras
import keras
import numpy as np
import tensorflow as tf
from keras import layers as L

NUM_CLASSES = 10  # of the deck's networks


def build(name: str, image_size: int, jit_compile: bool | str) -> keras.Model:
    """The deck's network behind the scaling of uint8 pixels given as floats; compiled with the deck's optimizer."""
    if name == "fan":
        deck, scaled = deck_keras.fan(), L.Rescaling(1 / 255)
    else:
        deck, scaled = deck_keras.resnet50v2(image_size), L.Rescaling(1 / 127.5, -1)
    deck.layers[-1].dtype_policy = keras.DTypePolicy("float32")  # the softmax, also under mixed_bfloat16
    model = keras.Sequential([L.Input((32, 32, 3)), scaled, *deck.layers])
    adam, loss = keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy"
    model.compile(adam, loss, metrics=["accuracy"], jit_compile=jit_compile)
    return model


class Times(keras.callbacks.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help=".npz of uint8 images [n, 32, 32, 3] and int64 labels [n]")
    parser.add_argument("--model", choices=("fan", "resnet50v2"), required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--num-skipped", type=int, required=True)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--policy", choices=("float32", "mixed_bfloat16"), default="float32")
    parser.add_argument("--xla", action="store_true", help="compile by XLA (Keras leaves that out on the CPU)")
    args = parser.parse_args()
    keras.config.set_dtype_policy(args.policy)
    with np.load(args.images) as file:
        images, labels = file["images"], file["labels"]
    if labels.max() >= NUM_CLASSES:
        sys.exit(f"the deck's networks have {NUM_CLASSES} classes, the images have a label {labels.max()}")
    model = build(args.model, args.image_size, args.xla or "auto")
    data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images)).repeat()
    data = data.batch(args.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    times, num_steps = Times(), args.num_skipped + args.num_steps
    model.fit(data, epochs=1, steps_per_epoch=num_steps, verbose=0, callbacks=[times])
    seconds = times.ends[num_steps - 1] - times.ends[args.num_skipped - 1]
    print(json.dumps({"images_per_second": args.num_steps * args.batch_size / seconds}))


if __name__ == "__main__":
    main()
