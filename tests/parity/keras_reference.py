# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0", "h5py>=3.11"]
# ///
"""What the deck's two networks compute in real Keras, written to a folder: weights, inputs and outputs.

Runs in an environment of its own (`uv run --script`), since TensorFlow is nothing that the project needs.
usage: keras_reference.py OUT [--images NPZ] [--imagenet WEIGHTS]
"""

import argparse
import os

os.environ |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

import h5py
import keras
import numpy as np
from keras import layers as L
from keras.src.legacy.saving import legacy_h5_format

NUM_STEPS = 10


def dense_block(x, units):
    return L.BatchNormalization()(L.Dense(units)(x))


def fan():
    """The deck's Fan; its dropouts, here off, stand after each of the first six blocks."""
    x = inputs = L.Input((32, 32, 3))
    for filters in (32, 64, 128, 128, 256, 256, 512):
        x = L.Dropout(0.0)(L.ReLU()(L.BatchNormalization()(L.Conv2D(filters, 3)(x))))
    x = L.Flatten()(x)
    for units in (512, 128):
        x = L.ReLU()(dense_block(x, units))
    return keras.Model(inputs, L.Dense(10)(x))


def resnet50v2(size, nested=True, finetune=False):
    """The deck's ResNet50V2, dropout off; the base as one layer of the model, or its layers one by one."""
    base = keras.applications.ResNet50V2(include_top=False, weights=None, input_shape=(size, size, 3))
    base.trainable = finetune
    inputs = L.Input((size, size, 3)) if nested else base.input
    x = L.Conv2D(128, 3)(base(inputs) if nested else base.output)
    x = L.GlobalAveragePooling2D()(x)
    for units in (512, 256, 128):
        x = L.ReLU()(L.Dropout(0.0)(dense_block(x, units)))
    return base, keras.Model(inputs, L.Dense(10)(x))


def randomize(model, rng):
    """Random weights as they may be after some training; BatchNorm's too."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            randomize(layer, rng)
        elif isinstance(layer, L.BatchNormalization):
            n = layer.gamma.shape[0]
            gamma, variance = rng.uniform(0.5, 1.5, (2, n))
            beta, mean = rng.normal(0, 0.3, (2, n))
            layer.set_weights([gamma, beta, mean, variance])
        elif layer.weights:
            layer.set_weights([w if w.ndim > 1 else rng.normal(0, 0.1, w.shape) for w in layer.get_weights()])


def batchnorms(model):
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from batchnorms(layer)
        elif isinstance(layer, L.BatchNormalization):
            yield layer


def compute(model, images, labels, steps, images_infer):
    """Logits in inference and training mode, and the losses and moving statistics of ten Adam steps."""
    start = model.get_weights()
    out = {f"infer_{name}": model(x, training=False).numpy() for name, x in images_infer.items()}
    out["train"] = model(images[0], training=True).numpy()
    model.set_weights(start)  # the call has moved the statistics
    out["counts"] = np.array([model.count_params(), sum(int(np.prod(w.shape)) for w in model.trainable_weights)])
    if steps:
        probabilities = keras.Model(model.input, L.Softmax()(model.output))
        probabilities.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
        losses = []
        for x, y in zip(images, labels, strict=True):
            probabilities.reset_metrics()
            losses.append(float(np.ravel(probabilities.train_on_batch(x, y))[0]))
        out["losses"] = np.array(losses)
        for i, layer in enumerate(batchnorms(model)):
            out[f"mean_{i}"], out[f"variance_{i}"] = layer.moving_mean.numpy(), layer.moving_variance.numpy()
        model.set_weights(start)
    return out


def save_published_layout(model, path, suffix):
    """As keras.applications publishes weights: a group per layer, variables named kernel:0."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
        if suffix:
            datasets = []
            file.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in datasets:
                file.move(name, name + suffix)


def images_of(rng, real, num_steps, batch, size):
    """Batches in 0..1: half random values, half real images if there are any (enlarged by repetition)."""
    images = rng.uniform(0, 1, (num_steps, batch, size, size, 3)).astype("float32")
    if real is not None:
        for i in range(num_steps):
            chosen = real[rng.integers(0, len(real), batch // 2)].astype("float32") / 255
            images[i, : batch // 2] = np.kron(chosen, np.ones((1, size // 32, size // 32, 1)))
    return images, rng.integers(0, 10, (num_steps, batch))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--images")
    parser.add_argument("--imagenet")
    args = parser.parse_args()
    out, rng = args.out, np.random.default_rng(0)
    real = np.load(args.images)["images"] if args.images else None
    keras.utils.set_random_seed(0)

    if args.imagenet:
        base = keras.applications.ResNet50V2(include_top=False, weights=args.imagenet, input_shape=(224, 224, 3))
        random, _ = images_of(rng, None, 1, 4, 224)
        images = random[0] * 2 - 1
        if real is not None:
            resized = keras.ops.convert_to_numpy(L.Resizing(224, 224)(real[:4].astype("float32")))
            images = np.concatenate([images, resized / 127.5 - 1])
        np.savez(f"{out}/imagenet.npz", images=images, features=base(images, training=False).numpy())
        return

    def write(name, model, images, labels, steps=False, **infer):
        np.savez(
            f"{out}/{name}.npz", images=images, labels=labels, **infer, **compute(model, images, labels, steps, infer)
        )

    model = fan()
    randomize(model, rng)
    weights = {"fan": model.get_weights()}
    model.save_weights(f"{out}/fan.weights.h5")
    model.save(f"{out}/fan.keras")
    small_images, small_labels = images, labels = images_of(rng, real, NUM_STEPS, 16, 32)
    write("fan", model, images, labels, random=images[0], signed=images[1] * 2 - 1, pixels=images[2] * 255)

    base, model = resnet50v2(96)
    randomize(model, rng)
    base.save_weights(f"{out}/base.weights.h5")
    base.save(f"{out}/base.keras")
    save_published_layout(base, f"{out}/base_published.h5", ":0")
    save_published_layout(base, f"{out}/base_unsuffixed.h5", "")
    model.save_weights(f"{out}/resnet50v2.weights.h5")
    model.save(f"{out}/resnet50v2.keras")
    model.save(f"{out}/resnet50v2_legacy.h5")
    images, image_labels = images_of(rng, real, NUM_STEPS, 16, 96)
    images = images * 2 - 1
    write("resnet50v2", model, images, image_labels, random=images[0], unit=images[1] / 2 + 0.5)
    _, flat = resnet50v2(96, nested=False)
    flat.set_weights(model.get_weights())
    flat.save_weights(f"{out}/resnet50v2_flat.weights.h5")
    large, labels = images_of(rng, real, 1, 4, 224)
    _, whole = resnet50v2(224)
    whole.set_weights(model.get_weights())
    write("resnet50v2_224", whole, large * 2 - 1, labels, random=large[0] * 2 - 1)
    small = real[:4] if real is not None else rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    resized = keras.ops.convert_to_numpy(L.Resizing(224, 224)(small.astype("float32")))
    np.savez(f"{out}/resizing.npz", images=small, resized=resized)
    # Training magnifies rounding: Adam moves each of the 85 million Dense weights by about 1e-3, batch statistics of 49
    # layers divide by small deviations. After ten steps in fp32 either side is up to 1e-2 off its own float64 result.
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    twin = fan()
    twin.set_weights(weights["fan"])
    small_images = small_images.astype("float64")
    write("fan_float64", twin, small_images, small_labels, steps=True, random=small_images[0])
    _, frozen = resnet50v2(96)
    _, tuned = resnet50v2(96, finetune=True)
    images = images.astype("float64")
    for name, twin in (("resnet50v2_float64", frozen), ("finetune_float64", tuned)):
        twin.set_weights(model.get_weights())
        write(name, twin, images, image_labels, steps=True, random=images[0])


if __name__ == "__main__":
    main()
