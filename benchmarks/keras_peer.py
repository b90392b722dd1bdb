# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0", "h5py>=3.11"]
# ///
"""Trains one of the deck's two networks in Keras on TensorFlow and prints images/s as JSON: a peer of peers.py.

As the deck has it: flips and the resize to 224 px are layers of the model, fit() runs it as a compiled graph. Images
are decoded and in memory, which spares Keras what the others do; tf.data shuffles and batches them ahead. Random
weights.
Runs in an environment of its own (`uv run --script`), since TensorFlow is nothing that the project needs.
"""

import argparse
import json
import os
import time
from typing import Any

os.environ |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L


def fan(x: Any) -> Any:
    for filters, rate in zip((32, 64, 128, 128, 256, 256, 512), (0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0), strict=True):
        x = L.ReLU()(L.BatchNormalization()(L.Conv2D(filters, 3)(x)))
        x = L.Dropout(rate)(x) if rate else x
    x = L.Flatten()(x)
    for units in (512, 128):
        x = L.ReLU()(L.BatchNormalization()(L.Dense(units)(x)))
    return x


def resnet50v2(x: Any) -> Any:
    base = keras.applications.ResNet50V2(include_top=False, weights=None, input_shape=x.shape[1:])
    base.trainable = False
    x = L.GlobalAveragePooling2D()(L.Conv2D(128, 3)(base(x)))
    for units in (512, 256, 128):
        x = L.ReLU()(L.Dropout(0.1)(L.BatchNormalization()(L.Dense(units)(x))))
    return x


def build(name: str, num_classes: int, image_size: int, jit_compile: bool | str) -> keras.Model:
    """Takes uint8 pixels as floats; compiled with the deck's optimizer."""
    inputs = L.Input((32, 32, 3))
    x = L.RandomFlip("horizontal_and_vertical")(inputs)
    if name == "fan":
        x = fan(L.Rescaling(1 / 255)(x))
    else:
        x = resnet50v2(L.Rescaling(1 / 127.5, -1)(L.Resizing(image_size, image_size)(x)))
    model = keras.Model(inputs, L.Dense(num_classes, activation="softmax", dtype="float32")(x))
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
    model = build(args.model, int(labels.max()) + 1, args.image_size, args.xla or "auto")
    data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images)).repeat()
    data = data.batch(args.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    times, num_steps = Times(), args.num_skipped + args.num_steps
    model.fit(data, epochs=1, steps_per_epoch=num_steps, verbose=0, callbacks=[times])
    seconds = times.ends[num_steps - 1] - times.ends[args.num_skipped - 1]
    print(json.dumps({"images_per_second": args.num_steps * args.batch_size / seconds}))


if __name__ == "__main__":
    main()
