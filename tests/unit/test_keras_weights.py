"""Weights in Keras's file formats, written by hand: what fits is read whole, what does not is named."""

import hashlib
import http.server
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from keras_files import NUMBERED, keras_layout, small
from torch import nn

from cifar_dist import models
from cifar_dist.cli import weights as weights_job
from cifar_dist.errors import UserError
from cifar_dist.models import keras_weights
from cifar_dist.models.keras_weights import (
    base_layers,
    check_head,
    described_layers,
    load_keras_weights,
    read_file,
    tensors_of,
)


def write_published(path: Path, layers: dict[str, nn.Module]) -> None:
    """A group per layer, in it one of the same name, in that kernel:0, ..."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["input_1", *layers]
        file.create_group("input_1")
        for name, module in layers.items():
            for variable, tensor in tensors_of(module).items():
                file[f"{name}/{name}/{variable}:0"] = keras_layout(tensor)


def write_numbered(path: Path, layers: list[tuple[str, nn.Module]]) -> None:
    """Keras 3's .weights.h5, with an optimizer and a dropout's seed beside the layers."""
    with h5py.File(path, "w") as file:
        file["optimizer/vars/0"] = np.zeros((), np.int64)
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
        for name, module in layers:
            for i, tensor in enumerate(tensors_of(module).values()):
                file[f"layers/{name}/vars/{i}"] = keras_layout(tensor)


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    write_numbered(tmp_path / "small.weights.h5", list(zip(NUMBERED, small(1), strict=True)))
    return tmp_path / "small.weights.h5"


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return models.build("resnet50v2", seed=1)


@pytest.fixture(scope="module")
def published(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "published.h5"
    write_published(path, base_layers(resnet.base))
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_numbered_layers_come_in_order(numbered: Path):
    network = small(2)
    assert load_keras_weights(network, numbered) == len(network.state_dict())
    assert same(network, small(1))


def test_the_keras_archive(numbered: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "small.keras", "w") as archive:
        archive.write(numbered, "model.weights.h5")
    network = small(2)
    load_keras_weights(network, tmp_path / "small.keras")
    assert same(network, small(1))


def test_ten_and_more_layers_are_sorted_by_number(tmp_path: Path):
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    names = ["dense", *(f"dense_{i}" for i in range(1, 12))]
    write_numbered(tmp_path / "w.weights.h5", list(zip(names, network, strict=True)))
    other = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    load_keras_weights(other, tmp_path / "w.weights.h5")
    assert same(network, other)


def test_the_published_file_fills_the_base_and_leaves_the_head(resnet: nn.Module, published: Path):
    network = models.build("resnet50v2", seed=2)
    head = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("base.")}
    assert load_keras_weights(network, published) == 270
    assert same(network.base, resnet.base)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in head.items())
    block = h5py.File(published)["conv3_block2_2_conv/conv3_block2_2_conv/kernel:0"]
    assert np.array_equal(network.base.blocks[4].conv2.weight.detach().numpy().transpose(2, 3, 1, 0), block[()])


def test_a_whole_model_that_names_the_base_and_numbers_the_head(resnet: nn.Module, tmp_path: Path):
    """As Keras 2 saves a model: the head's numbers start anywhere."""
    head = [m for n, m in resnet.named_modules() if not n.startswith("base") and hasattr(m, "weight")]
    names = ["conv2d_7", "dense_3", "batch_normalization_9", "dense_4", "batch_normalization_10"]
    names += ["dense_5", "batch_normalization_11", "dense_6"]
    write_published(tmp_path / "whole.h5", base_layers(resnet.base) | dict(zip(names, head, strict=True)))
    network = models.build("resnet50v2", seed=2)
    assert load_keras_weights(network, tmp_path / "whole.h5") == len(network.state_dict())
    assert same(network, resnet)


def layer(kind: str, **settings: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": kind.lower(), **settings}}


RELU_HEADS = {
    "own activation": [layer("Conv2D", activation="relu"), layer("GlobalAveragePooling2D")],
    "a layer ReLU": [layer("Conv2D", activation="linear"), layer("ReLU")],
    "a layer Activation": [layer("Conv2D", activation="linear"), layer("Activation", activation="relu")],
    "a layer as activation": [layer("Conv2D", activation={"class_name": "ReLU", "config": {}}), layer("Flatten")],
    "nested": [layer("Sequential", layers=[layer("Conv2D", activation="relu"), layer("Flatten"), layer("Dense")])],
    "nested as a list": [
        {"class_name": "Sequential", "config": [layer("Conv2D", activation="relu"), layer("Flatten")]}
    ],
    "none: the base with its own top": [{"class_name": "Conv2D", "config": {"name": "conv5_block3_3_conv"}}],
}
OTHER_HEADS = {
    "none": [layer("Conv2D", activation="linear"), layer("GlobalAveragePooling2D")],
    "another": [layer("Conv2D", activation="gelu"), layer("GlobalAveragePooling2D")],
    "another, nested": [layer("Sequential", layers=[layer("Conv2D", activation="linear"), layer("Flatten")])],
    "a layer as another activation": [layer("Conv2D", activation={"class_name": "ELU"}), layer("Flatten")],
    "later": [layer("Conv2D", activation="linear"), layer("Dropout", rate=0.1), layer("ReLU")],
}


@pytest.mark.parametrize("head", [*RELU_HEADS, *OTHER_HEADS])
def test_a_file_that_describes_its_head_must_have_the_relu(head: str):
    """The base's own convolutions, whose ReLUs are layers of their own, come first in what Keras describes."""
    base = [{"class_name": "Conv2D", "config": {"name": "conv1_conv", "activation": "linear"}}, layer("MaxPooling2D")]
    layers = [*base, *(RELU_HEADS | OTHER_HEADS)[head], layer("Dense", units=10)]
    described = list(described_layers({"class_name": "Functional", "config": {"layers": layers}}))
    assert described == list(described_layers({"class_name": "Sequential", "config": layers}))
    if head in RELU_HEADS:
        check_head(described, "w.keras")
    else:
        with pytest.raises(UserError, match=r"w\.keras: the head's convolution conv2d has no ReLU behind it"):
            check_head(described, "w.keras")
    check_head(described[:2], "w.keras")  # the base alone
    check_head([], "w.keras")


def test_a_file_s_description_is_read_with_nested_models(numbered: Path, tmp_path: Path):
    described = {"class_name": "Sequential", "config": {"layers": [*RELU_HEADS["nested"], layer("Dense", units=10)]}}
    with zipfile.ZipFile(tmp_path / "small.keras", "w") as archive:
        archive.write(numbered, "model.weights.h5")
        archive.writestr("config.json", json.dumps(described))
    with h5py.File(numbered, "a") as opened:
        opened.attrs["model_config"] = json.dumps(described)
    for file in (numbered, tmp_path / "small.keras"):
        with ExitStack() as files:
            described_in_file = read_file(file, files, num_bytes=1 << 20)[1]
        assert [kind for kind, _ in described_in_file] == ["Conv2D", "Flatten", "Dense", "Dense"]


@pytest.mark.parametrize(
    "description",
    ["[]", "{", '{"config": {"layers": 3}}', '{"config": {"layers": [3]}}', '{"config": {"layers": [{}]}}'],
)
def test_a_description_that_is_none_of_keras_s(description: str, numbered: Path):
    with h5py.File(numbered, "a") as opened:
        opened.attrs["model_config"] = description
    with pytest.raises(UserError, match="is not a Keras weights file"):
        load_keras_weights(small(2), numbered)


def remove(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def put(name: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def act(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file[name] = value

    return act


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("layers/dense_1"), "lacks the layer 5 (dense)"),
        (remove("layers/conv2d/vars/0"), "layer layers/conv2d lacks kernel"),
        (remove("layers/dense_1/vars/0"), "layer layers/dense_1 lacks kernel"),
        (remove("layers/batch_normalization/vars/0"), "layer layers/batch_normalization lacks gamma"),
        (put("layers/dense/vars/0", np.array(b"text")), "layers/dense/vars/0 holds values of the type |S4"),
        (remove("layers/conv2d/vars/1"), "layer layers/conv2d lacks bias"),
        (remove("layers/batch_normalization_1/vars/3"), "layer layers/batch_normalization_1 lacks moving_variance"),
        (put("layers/dense_2/vars/0", np.ones((6, 6))), "layer layers/dense_2 (dense) is left over"),
        (put("layers/conv2d_1/vars/1", np.ones(5)), "layer layers/conv2d_1 has bias, for which 2 has no place"),
        (put("layers/conv2d/vars/2", np.ones(4)), "layers/conv2d has 2"),
        (put("layers/dense/vars/0", np.ones((5, 7))), "kernel of layer layers/dense has the shape [5, 7]"),
        (put("layers/conv2d/vars/0", np.ones((4, 3, 3, 3))), "kernel of layer layers/conv2d has the shape"),
        (put("layers/dense/vars/1", np.full(6, np.nan)), "bias of layer layers/dense holds values that are not finite"),
        (put("layers/embedding/vars/0", np.ones((9, 6))), "layers/embedding (dense) is left over"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(numbered: Path, change: Callable, message: str):
    with h5py.File(numbered, "a") as file:
        change(file)
    network = small(2)
    with pytest.raises(UserError) as caught:
        load_keras_weights(network, numbered)
    assert message in str(caught.value)
    assert str(numbered) in str(caught.value)
    assert same(network, small(2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv4_block3_1_bn", "lacks the layer conv4_block3_1_bn (batch normalization)"),
        ("post_bn", "lacks the layer post_bn"),
        ("", "layer extra/extra (convolution) is left over"),
    ],
)
def test_a_missing_or_extra_layer_of_the_base_is_named(published: Path, tmp_path: Path, name: str, message: str):
    file = tmp_path / "damaged.h5"
    file.write_bytes(published.read_bytes())
    with h5py.File(file, "a") as opened:
        if name:
            del opened[name]
        else:
            opened["extra/extra/kernel:0"] = np.ones((1, 1, 2, 2))
    with pytest.raises(UserError) as caught:
        load_keras_weights(models.build("resnet50v2"), file)
    assert message in str(caught.value)


def test_resnet_weights_do_not_fit_fan(published: Path):
    with pytest.raises(UserError, match="conv"):
        load_keras_weights(models.build("fan"), published)


@pytest.mark.parametrize("name", ["w.h5", "w.keras"])
def test_what_is_no_weights_file(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="no weights file"):
        load_keras_weights(small(0), tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 or anything")
    with pytest.raises(UserError, match="is not a Keras weights file"):
        load_keras_weights(small(0), tmp_path / name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UserError, match="is not a Keras weights file"):
        load_keras_weights(small(0), tmp_path / name)


def test_a_cut_off_file(published: Path, tmp_path: Path):
    (tmp_path / "cut.h5").write_bytes(published.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match="is not a Keras weights file"):
        load_keras_weights(models.build("resnet50v2"), tmp_path / "cut.h5")


# What an HDF5 file can hold besides weights. KERNEL and BIAS are places that load_keras_weights reads.

KERNEL, BIAS = "layers/dense/vars/0", "layers/dense/vars/1"
SECRET = b"TOP SECRET " * 3


def link(target: Any) -> Callable[[h5py.File, Path], None]:
    def act(file: h5py.File, _: Path) -> None:
        file.move(BIAS, "kept")
        file[BIAS] = target

    return act


def named_link(file: h5py.File, _: Path) -> None:
    file["layers/a\nb"] = h5py.SoftLink("/x")


def link_to_another_file(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["vars"] = np.ones(6, np.float32)
    del file[BIAS]
    file[BIAS] = h5py.ExternalLink("other.h5", "/vars")


def link_of_a_group(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["vars/0"] = np.ones((5, 6), np.float32)
        other["vars/1"] = np.ones(6, np.float32)
    del file["layers/dense"]
    file["layers/dense"] = h5py.ExternalLink("other.h5", "/")


def link_of_the_model(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        file.copy("layers", other)
    del file["layers"]
    file["model_weights"] = h5py.ExternalLink("other.h5", "/")


def external_values(file: h5py.File, folder: Path) -> None:
    (folder / "secret.txt").write_bytes(SECRET)
    del file[BIAS]
    file.create_dataset(BIAS, (6,), "<f4", external=[(str(folder / "secret.txt"), 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["vars"] = np.ones(6, np.float32)
    layout = h5py.VirtualLayout((6,), "<f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "vars", (6,))
    del file[BIAS]
    file.create_virtual_dataset(BIAS, layout)


def twice(name: str, place: str) -> Callable[[h5py.File, Path], None]:
    def act(file: h5py.File, _: Path) -> None:
        file[place] = file[name]

    return act


def typed(dtype: Any) -> Callable[[h5py.File, Path], None]:
    def act(file: h5py.File, _: Path) -> None:
        del file[BIAS]
        file.create_dataset(BIAS, (6,), dtype)

    return act


def named_type(file: h5py.File, _: Path) -> None:
    file["layers/kind"] = np.dtype("<f4")


def nested(file: h5py.File, _: Path) -> None:
    file["/".join(["deep"] * 5000)] = np.ones(6)


def stored(shape: tuple[int, ...] | None, **options: Any) -> Callable[[h5py.File, Path], None]:
    def act(file: h5py.File, _: Path) -> None:
        del file[BIAS]
        file.create_dataset(BIAS, shape, "<f4", **options)

    return act


def plugin(file: h5py.File, _: Path) -> None:
    """A filter that no library here has; HDF5 would look for its plugin when the values are read."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((6,))
    settings.set_filter(300, h5py.h5z.FLAG_OPTIONAL, ())
    del file[BIAS]
    space = h5py.h5s.create_simple((6,))
    h5py.h5d.create(file["layers/dense/vars"].id, b"1", h5py.h5t.IEEE_F32LE, space, settings)


FORGED = {
    "a link to another file": (link_to_another_file, f"{BIAS} is a link to /vars in other.h5"),
    "a group that is a link": (link_of_a_group, "layers/dense is a link to / in other.h5"),
    "a model that is a link": (link_of_the_model, "model_weights is a link to / in other.h5"),
    "a soft link": (link(h5py.SoftLink("/kept")), f"{BIAS} is a link to /kept in the same file"),
    "a soft link to itself": (link(h5py.SoftLink(f"/{BIAS}")), f"{BIAS} is a link to"),
    "a link to nothing": (link(h5py.ExternalLink("no.h5", "/x")), f"{BIAS} is a link to /x in no.h5"),
    "a name of several lines": (named_link, "layers/a?b is a link to"),
    "values in another file": (external_values, f"{BIAS} keeps its values in another file ("),
    "values of other datasets": (virtual, f"{BIAS} is put together from other datasets"),
    "a dataset twice": (twice(BIAS, "layers/zzz/vars/0"), f"{BIAS} is in the file twice"),
    "a circle": (twice("layers", "layers/dense/again"), "layers/dense/again is in the file twice"),
    "a circle through the root": (twice("/", "layers/again"), "layers/again is in the file twice"),
    "groups without end": (nested, "lies more than 64 groups deep"),
    "texts": (typed(h5py.string_dtype()), f"{BIAS} holds values of the type object"),
    "references": (typed(h5py.ref_dtype), f"{BIAS} holds values of the type object"),
    "references to regions": (typed(h5py.regionref_dtype), f"{BIAS} holds values of the type object"),
    "lists": (typed(h5py.vlen_dtype(np.float32)), f"{BIAS} holds values of the type object"),
    "records": (typed(np.dtype([("a", "<f4")])), f"{BIAS} holds values of the type"),
    "complex numbers": (typed(np.complex64), f"{BIAS} holds values of the type complex64"),
    "a type with a name": (named_type, "layers/kind is neither a group nor a dataset"),
    "a plugin": (plugin, f"{BIAS} is packed by the filter 300"),
    "a huge chunk": (stored((6,), chunks=(1 << 28,), maxshape=(None,)), "is stored in chunks of 268435456 values"),
    "no shape": (lambda file, _: (file.__delitem__(BIAS), file.create_dataset(BIAS, data=h5py.Empty("f"))), "no shape"),
}


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_file_is_refused_before_a_value_is_read(
    numbered: Path, forgery: str, archived: bool, monkeypatch: pytest.MonkeyPatch
):
    forge, message = FORGED[forgery]
    with h5py.File(numbered, "a") as file:
        forge(file, numbered.parent)
    path = numbered
    if archived:
        path = numbered.with_name("small.keras")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(numbered, "model.weights.h5")
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("a value was read"))
    network = small(2)
    with pytest.raises(UserError) as caught:
        load_keras_weights(network, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(network, small(2))


@pytest.mark.parametrize("place", ["optimizer/vars/9", "elsewhere"])
def test_links_in_parts_that_are_not_read_are_refused_too(numbered: Path, place: str):
    with h5py.File(numbered, "a") as file:
        file[place] = h5py.ExternalLink("other.h5", "/x")
    with pytest.raises(UserError, match=f"{place} is a link to /x in other.h5"):
        load_keras_weights(small(2), numbered)


@pytest.mark.parametrize("place", [BIAS, "layers/dense/vars/2", "layers/more/vars/0"])
@pytest.mark.parametrize("chunks", [None, True])
def test_a_declared_size_takes_no_memory(numbered: Path, place: str, chunks: bool | None):
    """A terabyte that the file only declares: HDF5 would make zeros of it."""
    with h5py.File(numbered, "a") as file:
        if place in file:
            del file[place]
        file.create_dataset(place, (1 << 38,), "<f4", chunks=chunks)
    with pytest.raises(UserError, match=r"has the shape \[274877906944\]|has 2, for which|is left over"):
        load_keras_weights(small(2), numbered)


def test_an_archive_that_unpacks_without_end_is_refused(numbered: Path, monkeypatch: pytest.MonkeyPatch):
    path = numbered.with_name("small.keras")
    network = small(2)
    num_bytes = keras_weights.most_bytes(network)
    for name, message in (("model.weights.h5", "model.weights.h5 is larger"), ("config.json", "config.json is larger")):
        monkeypatch.setattr(keras_weights, "MAX_CONFIG_BYTES", 1 << 20)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(numbered, "model.weights.h5") if name == "config.json" else None
            archive.writestr(name, bytes(num_bytes + 1))
        with pytest.raises(UserError, match=message):
            load_keras_weights(network, path)
        assert path.stat().st_size < 1 << 20


def test_packed_weights_and_other_numbers_are_read(tmp_path: Path):
    """Keras writes neither, but HDF5 tools do, without another file or a plugin."""
    first = small(1)
    write_numbered(tmp_path / "w.weights.h5", list(zip(NUMBERED, first, strict=True)))
    with h5py.File(tmp_path / "w.weights.h5", "a") as file:
        for name, options in ((KERNEL, {"compression": "gzip", "shuffle": True}), (BIAS, {"compression": "lzf"})):
            values = file[name][()]
            del file[name]
            file.create_dataset(name, data=values.astype(np.float64), **options)
    network = small(2)
    load_keras_weights(network, tmp_path / "w.weights.h5")
    assert same(network, first)


def test_names_that_lead_out_of_their_group_are_not_followed(numbered: Path):
    with h5py.File(numbered, "a") as file:
        file.attrs["layer_names"] = ["/", ".", "layers/dense", "no such layer"]
    network = small(2)
    load_keras_weights(network, numbered)
    assert same(network, small(1))


def test_values_that_cannot_be_unpacked_are_named(numbered: Path):
    with h5py.File(numbered, "a") as file:
        values = file[KERNEL][()]
        del file[KERNEL]
        file.create_dataset(KERNEL, data=values, compression="gzip")
        chunk = file[KERNEL].id.get_chunk_info(0)
    content = bytearray(numbered.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    numbered.write_bytes(content)
    with pytest.raises(UserError, match=f"{KERNEL} cannot be read"):
        load_keras_weights(small(2), numbered)


# jobs/weights.py


@pytest.fixture
def server(published: Path) -> Iterator[tuple[str, list[int]]]:
    """(address, answers): a web server that gives each status in `answers` once, then the file."""
    answers: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = answers.pop(0) if answers else 200
            content = published.read_bytes() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/weights.h5", answers
        httpd.shutdown()
        thread.join()


def test_download_retries_checks_and_stores(server, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    url, answers = server
    answers.extend([503])
    content = published.read_bytes()
    target = weights_job.store_weights(url, None, hashlib.md5(content).hexdigest(), str(tmp_path / "out"))
    assert Path(target).read_bytes() == content
    assert [file.name for file in (tmp_path / "out").iterdir()] == [weights_job.PUBLISHED_NAME]
    assert f"270 tensors for resnet50v2, sha256 {hashlib.sha256(content).hexdigest()}" in capsys.readouterr().out


def test_a_download_of_another_file_is_refused(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_job, "RETRIES", 0)
    with pytest.raises(UserError, match="is not the expected file: its md5 is not fac2f116257151a9d068a22e544a4917"):
        weights_job.store_weights(server[0], None, weights_job.PUBLISHED_MD5, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_job, "RETRIES", 0)
    with pytest.raises(UserError, match=r"cannot download http://127.0.0.1:9/.* name it with --path"):
        weights_job.store_weights("http://127.0.0.1:9/w.h5", None, weights_job.PUBLISHED_MD5, str(tmp_path))


def test_a_local_file_instead(published: Path, tmp_path: Path):
    md5 = hashlib.md5(published.read_bytes()).hexdigest()
    assert Path(weights_job.store_weights("", str(published), md5, str(tmp_path))).exists()
    with pytest.raises(UserError, match=r"its md5 is .*, not fac2f1"):
        weights_job.store_weights("", str(published), weights_job.PUBLISHED_MD5, str(tmp_path))
    with pytest.raises(UserError, match="is not a file"):
        weights_job.store_weights("", str(tmp_path / "none"), md5, str(tmp_path))


def test_another_file_of_that_name_is_left_alone(published: Path, tmp_path: Path):
    md5 = hashlib.md5(published.read_bytes()).hexdigest()
    target = tmp_path / weights_job.PUBLISHED_NAME
    target.write_bytes(b"somebody's own")
    with pytest.raises(UserError, match="is there already and is another file; remove it, or use another --out"):
        weights_job.store_weights("", str(published), md5, str(tmp_path))
    assert [path.read_bytes() for path in tmp_path.iterdir() if path != published] == [b"somebody's own"]
