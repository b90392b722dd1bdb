# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0", "tf-keras==2.21.0", "h5py>=3.11"]
# [tool.uv]
# override-dependencies = ["tensorflow; python_version < '3'"]  # tf-keras asks for it; tensorflow-cpu serves it too
# ///
"""What the deck's two networks are and compute in real Keras, written to a folder: structure, weights, outputs.

Runs in an environment of its own (`uv run --script`), since the project itself does not need TensorFlow.
usage: keras_reference.py OUT [--seed N] [--images NPZ] [--imagenet WEIGHTS]
"""

import argparse
import json
import os
from collections import Counter

os.environ |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

import deck_keras
import h5py
import keras
import numpy as np
import tf_keras
from keras import layers as L
from keras.src.legacy.saving import legacy_h5_format

NUM_STEPS = 10
NUM_FLIPS = 4000


def structure(model):
    """Every layer in the order of the graph: name, class, settings, and the names of the layers that feed it."""
    found, before = [], "input"
    for layer in model.layers:
        if isinstance(layer, L.InputLayer):
            continue
        if isinstance(layer, keras.Model):
            names = {layer.input._keras_history.operation.name: before}
            for inner in layer.layers[1:]:
                inputs = inner.input if isinstance(inner.input, list) else [inner.input]
                feeding = [x._keras_history.operation.name for x in inputs]
                found.append(described(inner, [names.get(name, name) for name in feeding]))
            before = layer.output._keras_history.operation.name
            continue
        found.append(described(layer, [before]))
        before = layer.name
    return found


def described(layer, inputs):
    config = {key: value for key, value in layer.get_config().items() if key not in ("dtype", "name")}
    return {"name": layer.name, "class": type(layer).__name__, "config": config, "inputs": inputs}


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
        elif isinstance(layer, L.Conv2D | L.Dense):
            layer.set_weights([w if w.ndim > 1 else rng.normal(0, 0.1, w.shape) for w in layer.get_weights()])


def without_dropout(model):
    for layer in model.layers:
        if isinstance(layer, L.Dropout):
            layer.rate = 0
    return model


def batchnorms(model):
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from batchnorms(layer)
        elif isinstance(layer, L.BatchNormalization):
            yield layer


def logits(model, images, training):
    """The deck's last layer without its softmax."""
    model.layers[-1].activation = keras.activations.linear
    out = model(images, training=training).numpy()
    model.layers[-1].activation = keras.activations.softmax
    return out


def compute(model, images, labels, steps, images_infer):
    """Logits in inference and training mode, and the losses and moving statistics of ten Adam steps.

    Inference runs the whole model, from images of 32 px. Training mode leaves its random layer RandomFlip out and
    begins at what Resizing gives, which is stored as the images.
    """
    out = {f"infer_{name}": logits(model, x, training=False) for name, x in images_infer.items()}
    out["counts"] = np.array([model.count_params(), sum(int(np.prod(w.shape)) for w in model.trainable_weights)])
    resized = list(images)
    if isinstance(model.layers[0], L.Resizing):
        resized = [keras.ops.convert_to_numpy(model.layers[0](x)).astype(x.dtype) for x in images]
        out |= {name: keras.ops.convert_to_numpy(model.layers[0](x)) for name, x in images_infer.items()}
    else:
        out |= images_infer
    out |= {"images": np.stack(resized), "labels": labels}
    start = model.get_weights()
    trained = keras.Sequential([keras.Input(resized[0].shape[1:])])
    for layer in model.layers:
        if not isinstance(layer, L.Resizing | L.RandomFlip):
            trained.add(layer)
    out["train"] = logits(trained, resized[0], training=True)
    model.set_weights(start)  # the call has moved the statistics
    if steps:
        trained.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
        losses = []
        for x, y in zip(resized, labels, strict=True):
            trained.reset_metrics()
            losses.append(float(np.ravel(trained.train_on_batch(x, y))[0]))
        out["losses"] = np.array(losses)
        for i, layer in enumerate(batchnorms(trained)):
            out[f"mean_{i}"], out[f"variance_{i}"] = layer.moving_mean.numpy(), layer.moving_variance.numpy()
        model.set_weights(start)
    return out


def flat(model):
    """The same layers with those of the nested base as layers of the model itself."""
    base, *head = model.layers[2:]
    x = base.output
    for layer in head:
        x = layer(x)
    return keras.Model(base.input, x)


def save_published_layout(model, path, suffix):
    """As keras.applications publishes weights: a group per layer, variables named kernel:0."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
        if suffix:
            datasets = []
            file.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in datasets:
                file.move(name, name + suffix)


def images_of(rng, real, num_steps, batch):
    """Batches of 32 px in 0..1: half random values, half real images if there are any."""
    images = rng.uniform(0, 1, (num_steps, batch, 32, 32, 3)).astype("float32")
    if real is not None:
        for i in range(num_steps):
            images[i, : batch // 2] = real[rng.integers(0, len(real), batch // 2)].astype("float32") / 255
    return images, rng.integers(0, 10, (num_steps, batch))


def drawn_flips(random_flip, seed):
    """How often each way of flipping [[0, 1], [2, 3]] came up among NUM_FLIPS images."""
    names = {(0, 1, 2, 3): "none", (1, 0, 3, 2): "horizontal", (2, 3, 0, 1): "vertical", (3, 2, 1, 0): "both"}
    images = np.arange(4, dtype="float32").reshape(1, 2, 2, 1).repeat(NUM_FLIPS, 0)
    flipped = np.asarray(random_flip("horizontal_and_vertical", seed=seed)(images, training=True))
    return Counter(names[tuple(image)] for image in flipped.reshape(NUM_FLIPS, 4).astype(int).tolist())


def write_imagenet(out, rng, real, weights):
    base = keras.applications.ResNet50V2(include_top=False, weights=weights, input_shape=(224, 224, 3))
    images = rng.uniform(-1, 1, (4, 224, 224, 3)).astype("float32")
    if real is not None:
        resized = keras.ops.convert_to_numpy(L.Resizing(224, 224)(real[:4].astype("float32")))
        images = np.concatenate([images, resized / 127.5 - 1])
    np.savez(f"{out}/imagenet.npz", images=images, features=base(images, training=False).numpy())


def write_structures(out, seed):
    networks = {"fan": deck_keras.fan(), "resnet50v2": deck_keras.resnet50v2()}
    found = {name: structure(model) for name, model in networks.items()}
    for generation in (keras, tf_keras):
        found[f"flips of Keras {generation.__version__[0]}"] = drawn_flips(generation.layers.RandomFlip, seed)
    with open(f"{out}/structure.json", "w") as file:
        json.dump(found, file, indent=1, default=str)


def write_weights(out, fan, model):
    """The weights in every format that Keras writes."""
    fan.save_weights(f"{out}/fan.weights.h5")
    fan.save(f"{out}/fan.keras")
    base = model.layers[2]
    base.save_weights(f"{out}/base.weights.h5")
    base.save(f"{out}/base.keras")
    save_published_layout(base, f"{out}/base_published.h5", ":0")
    save_published_layout(base, f"{out}/base_unsuffixed.h5", "")
    model.save_weights(f"{out}/resnet50v2.weights.h5")
    model.save(f"{out}/resnet50v2.keras")
    model.save(f"{out}/resnet50v2_legacy.h5")
    flat(model).save_weights(f"{out}/resnet50v2_flat.weights.h5")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images")
    parser.add_argument("--imagenet")
    args = parser.parse_args()
    out, rng = args.out, np.random.default_rng(args.seed)
    real = np.load(args.images)["images"] if args.images else None
    keras.utils.set_random_seed(args.seed)
    if args.imagenet:
        write_imagenet(out, rng, real, args.imagenet)
        return
    write_structures(out, args.seed)

    def write(name, model, images, labels, steps=False, **infer):
        np.savez(f"{out}/{name}.npz", **compute(without_dropout(model), images, labels, steps, infer))

    fan, small, large = deck_keras.fan(), deck_keras.resnet50v2(96), deck_keras.resnet50v2()
    for model in (fan, small):
        randomize(model, rng)
    large.set_weights(small.get_weights())
    write_weights(out, fan, small)
    images, labels = images_of(rng, real, NUM_STEPS, 16)
    write("fan", fan, images, labels, random=images[0], signed=images[1] * 2 - 1, pixels=images[2] * 255)
    signed = images * 2 - 1
    write("resnet50v2", small, signed, labels, random=signed[0], unit=images[1])
    write("resnet50v2_224", large, signed[:1, :8], labels[:1, :8], random=signed[0, :8])
    pixels = real[:8] if real is not None else rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    resized = keras.ops.convert_to_numpy(L.Resizing(224, 224)(pixels.astype("float32")))
    whole = logits(large, pixels.astype("float32") / 127.5 - 1, training=False)
    np.savez(f"{out}/pixels.npz", pixels=pixels, resized=resized, logits=whole)
    # Training magnifies rounding: Adam moves each of the 85 million Dense weights by about 1e-3, batch statistics of 49
    # layers divide by small deviations. After ten steps in fp32 either side is up to 1e-2 off its own float64 result.
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    images, signed = images.astype("float64"), signed.astype("float64")
    twins = {"fan_float64": (deck_keras.fan(), fan, images)}
    twins["resnet50v2_float64"] = deck_keras.resnet50v2(96), small, signed
    twins["finetune_float64"] = deck_keras.resnet50v2(96, trainable=True), small, signed
    for name, (twin, model, inputs) in twins.items():
        twin.set_weights(model.get_weights())
        write(name, twin, inputs, labels, steps=True, random=inputs[0])


if __name__ == "__main__":
    main()
