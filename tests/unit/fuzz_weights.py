"""Fuzzing of Keras's weight files: the network is filled whole with what the file holds, or left as it was."""

import json
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import torch
from fuzzing import Group, Refused, outcome, require
from keras_files import NUMBERED, keras_layout, small
from mutations import BOUNDS, change_bytes, change_file, change_values, change_zip
from torch import nn

from cifar_dist.models.keras_weights import load_keras_weights, tensors_of

CONFIG: dict[str, Any] = {
    "class_name": "Functional",
    "config": {
        "layers": [
            {"class_name": "Conv2D", "config": {"name": "conv2d_7", "activation": "relu"}},
            {"class_name": "Dense", "config": {"name": "dense_3", "activation": "softmax"}},
        ]
    },
}


def write(path: Path, made: nn.Sequential, packed: bool, numbered: bool) -> None:
    """An HDF5 file of Keras's: of whole models with names, or of Keras 3 with numbers; its values in chunks or not."""
    options = {"chunks": True, "compression": "gzip", "shuffle": True} if packed else {}
    with h5py.File(path, "w") as file:
        if not numbered:
            file.attrs["layer_names"] = list(NUMBERED)
            file.attrs["model_config"] = json.dumps(CONFIG)
        for name, module in zip(NUMBERED, made, strict=True):
            for i, (variable, tensor) in enumerate(tensors_of(module).items()):
                place = f"layers/{name}/vars/{i}" if numbered else f"{name}/{name}/{variable}:0"
                file.create_dataset(place, data=keras_layout(tensor), **options)


class Weights(Group):
    areas = ("bytes", "structure", "archive")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.first, self.second = small(1), small(2)
        for packed in (False, True):
            for numbered in (False, True):
                write(self.original / f"{packed:d}{numbered:d}.h5", self.first, packed, numbered)
        with zipfile.ZipFile(self.original / "w.keras", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(self.original / "01.h5", "model.weights.h5")
            archive.writestr("config.json", json.dumps(CONFIG))
        self.before = {k: v.clone() for k, v in self.second.state_dict().items()}
        require(load_keras_weights(small(3), self.original / "w.keras") == len(self.before), "not filled")

    def assess(self, path: Path, same: bool) -> None:
        """A file that is filled from holds what was written, if `same`: its format has checksums."""
        self.second.load_state_dict(self.before)
        content = path.read_bytes() if path.is_file() else b""
        found = outcome(lambda: load_keras_weights(self.second, path))
        state, wanted = self.second.state_dict(), self.first.state_dict()
        if isinstance(found, Refused):
            require(all(torch.equal(state[k], v) for k, v in self.before.items()), "refused and changed")
        else:
            require(found == len(state) and all(v.isfinite().all() for v in state.values()), "not filled whole")
            require(not same or all(torch.equal(state[k], v) for k, v in wanted.items()), "other weights")
            require(not any(torch.equal(state[k], v) for k, v in self.before.items()), "a part is filled")
        require(not path.is_file() or path.read_bytes() == content, "the file was changed")

    def file(self, random: Random, copy: Path) -> Path:
        return copy / random.choice(["00.h5", "01.h5", "10.h5", "11.h5"])

    def bytes(self, random: Random, copy: Path) -> None:
        """Any bytes, also those of HDF5's own tables, of which most have no checksum."""
        path = self.file(random, copy)
        content = bytearray(path.read_bytes())
        if random.random() < 0.5:
            # Where HDF5 keeps its tables: their signatures, and the object headers before which there is none.
            marks = [b"TREE", b"HEAP", b"SNOD", b"\x89HDF", b"GCOL"]
            starts = [i for i in range(0, len(content), 8) if content[i : i + 4] in marks]
            at = random.choice(starts) + 4 * random.randrange(1, random.choice([24, 120]))
            size = random.choice([1, 2, 4, 8])
            value = random.choice([*BOUNDS, len(content), random.choice(starts), at]) % (1 << 8 * size)
            content[at : at + size] = value.to_bytes(size, "little")
            path.write_bytes(content)
            self.said = f"{path.name}: HDF5 field at {at} of {size}: {value}"
        elif random.random() < 0.9:
            changed, self.said = change_bytes(random, bytes(content))
            path.write_bytes(changed)
        else:
            self.said = change_file(random, path, copy / "11.h5")
        self.assess(path, same=False)

    def structure(self, random: Random, copy: Path) -> None:
        """Another tree of groups, links, shapes, types and descriptions, all valid HDF5."""
        path = self.file(random, copy)
        with h5py.File(path, "r+") as file:
            sets, groups = [], []
            file.visititems(lambda name, item: (sets if isinstance(item, h5py.Dataset) else groups).append(name))
            name, group = random.choice(sets), random.choice(groups)
            match kind := random.choice(
                [
                    "gone",
                    "shape",
                    "type",
                    "nan",
                    "link",
                    "soft",
                    "outside",
                    "twice",
                    "renamed",
                    "config",
                    "big",
                    "filter",
                    "attr",
                ]
            ):
                case "gone":
                    del file[random.choice([name, group])]
                case "shape" | "type" | "nan" | "big":
                    value = file[name][()]
                    del file[name]
                    if kind == "shape":
                        value = random.choice(
                            [value[..., None], value.ravel(), value[:0], value[..., :-1], value.sum()]
                        )
                    elif kind == "type":
                        value = random.choice([value.astype("S9"), value.astype(bool), value + 1j, value.astype("f2")])
                    elif kind == "nan":
                        value.flat[random.randrange(value.size)] = random.choice([np.nan, np.inf, 1e39])
                    if kind == "big":
                        file.create_dataset(name, (2 ** random.choice([20, 40, 60]),), "f4", chunks=(2**10,))
                    else:
                        file[name] = value
                case "link":
                    file[f"{group}/more"] = file[random.choice([name, group, "/"])]
                case "soft":
                    file[f"{group}/more"] = h5py.SoftLink(random.choice([f"/{group}", "/nowhere", f"/{group}/more"]))
                case "outside":
                    file[f"{group}/more"] = h5py.ExternalLink(str(copy / "00.h5"), "/")
                case "twice":
                    file.copy(file[name], f"{group}/more:0")
                case "renamed":
                    file.move(name, f"{group}/{random.choice(['variable:0', 'x', '99', 'seed_generator'])}")
                case "config":
                    values, _ = change_values(random, CONFIG)
                    file.attrs["model_config"] = random.choice([json.dumps(values), "[" * 5000, "{", "5", b"\xff"])
                case "filter":
                    file.attrs["layer_names"] = random.choice([["dense"], [b"\xff"], 5, [1, 2], ["a" * 1000], "dense"])
                case "attr":
                    file[group].attrs["layer_names"] = random.choice([["dense"], 5, [name], "text"])
            self.said = f"{path.name}: {kind} {name} {group}"
        self.assess(path, same=False)

    def archive(self, random: Random, copy: Path) -> None:
        path = copy / "w.keras"
        content = path.read_bytes()
        match random.choice(["zip", "zip", "config", "inner", "names"]):
            case "zip":
                changed, self.said = change_zip(random, content)
                path.write_bytes(changed)
                self.assess(path, same=True)
                return
            case "config":
                values, self.said = change_values(random, CONFIG)
                text = random.choice([json.dumps(values), "[" * 5000, "", "\xff"])
                files = {"model.weights.h5": (copy / "01.h5").read_bytes(), "config.json": text}
            case "inner":
                inner, self.said = change_bytes(random, (copy / "01.h5").read_bytes())
                files = {"model.weights.h5": inner, "config.json": json.dumps(CONFIG)}
            case _:
                name = random.choice(["../model.weights.h5", "MODEL.weights.h5", "x"])
                files, self.said = {name: (copy / "01.h5").read_bytes()}, f"named {name}"
        with zipfile.ZipFile(path, "w", random.choice([zipfile.ZIP_STORED, zipfile.ZIP_BZIP2])) as made:
            for name, data in files.items():
                made.writestr(name, data)
        self.assess(path, same=False)


def make(folder: Path) -> Group:
    return Weights(folder)
