"""Damage for the fuzz test: of bytes, of JSON, and of the formats whose fields say where other things lie.

Each function draws from `random` alone, so that a case's seed repeats it, and returns what it did in words.
"""

import contextlib
import hashlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cifar_dist.sealed_json import seal

BOUNDS = [0, 1, -1, 2, 127, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**62, 2**63 - 1, -(2**63)]
NAMES = ["", ".", "..", "../outside.txt", "/etc/passwd", "a/../outside.txt", "a\0b", "a\nb", "\ud800", "n" * 300]
NAMES += ["train-00000.parquet", "test-00000.parquet", "train-00099.parquet", "model.safetensors", "log.safetensors"]
NUMBERS = [0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, {"a": [1]}, "text", "0", "1.5", "\u202e"]


def deep(depth: int, leaf: Any = 1) -> Any:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


# Bytes.


def change_bytes(random: Random, content: bytes) -> tuple[bytes, str]:
    """Another content: bits, fields, lengths, lost and doubled parts."""
    data, n = bytearray(content), len(content)
    # Headers and footers say where the rest lies.
    at = random.choice([random.randrange(n), random.randrange(min(n, 64)), n - 1 - random.randrange(min(n, 600))])
    match kind := random.choice(["bit", "bit", "byte", "field", "field", "cut", "longer", "zeros", "gone", "twice"]):
        case "bit":
            for _ in range(random.choice([1, 1, 1, 3, 20])):
                data[at] ^= 1 << random.randrange(8)
                at = random.randrange(n)
        case "byte":
            data[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
        case "field":
            size = random.choice([1, 2, 4, 8])
            at -= at % size
            old = int.from_bytes(data[at : at + size], "little")
            value = random.choice([*BOUNDS, old + 1, old - 1, old * 2, n, n + 1, n - at])
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        case "cut":
            del data[random.choice([at, 0, n - 1]) :]
        case "longer":
            data += random.choice([b"\0", b"\n", bytes(1000), content, random.randbytes(9)])
        case "zeros":
            end = min(n, at + random.choice([4, 64, 4096]))
            data[at:end] = bytes(end - at)
        case "gone":
            del data[at : at + random.choice([1, 8, 100])]
        case "twice":
            data[at:at] = data[at : at + random.choice([1, 8, 100])]
    return bytes(data), f"{kind} at {at} of {n}"


# JSON.


def places(values: Any) -> list[tuple]:
    """The paths of everything in nested dicts and lists, but for what is deeper than any file of the project."""
    found, waiting = [], [((), values)]
    while waiting:
        path, value = waiting.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        inner = [((*path, key), item) for key, item in items if len(path) < 12]
        found += [path for path, _ in inner]
        waiting += inner
    return found


def change_values(random: Random, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Another dict: one to three of its fields are other ones, gone, new, swapped or doubled."""
    values, said = json.loads(json.dumps(values)), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        paths = places(values)
        if not paths:
            break
        *rest, key = random.choice(paths)
        inside: Any = values
        for part in rest:
            inside = inside[part]
        old = inside[key]
        is_number = type(old) in (int, float) and abs(old) < 2**64
        numbers = [old + 1, old - 1, -old, old + 0.5, str(old), old * 1000] if is_number else []
        texts = [old + " ", old.upper(), old[:-1], *NAMES] if isinstance(old, str) else []
        match kind := random.choice(["other", "other", "near", "near", "gone", "new", "swap", "twice", "deep"]):
            case "other":
                inside[key] = random.choice([*NUMBERS, *NAMES, *OTHERS])
            case "near":
                inside[key] = random.choice(numbers or texts or [[old], {"a": old}, {}, 0])
            case "gone":
                del inside[key]
            case "new" if isinstance(inside, dict):
                inside[random.choice([*NAMES, "colour"])] = random.choice([*NUMBERS, *OTHERS, old])
            case "swap":
                other = random.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
                inside[key], inside[other] = inside[other], inside[key]
            case "twice" if isinstance(inside, list):
                inside.insert(key, old)
            case "deep":
                inside[key] = deep(random.choice([50, 300, 900]))
        said.append(f"{kind} {'.'.join(map(str, [*rest, key]))[:80]}")
    return values, ", ".join(said)


def change_json(random: Random, content: bytes, reseal: bool | None = None) -> tuple[bytes, str]:
    """Another JSON file, which may be sealed again, or no JSON at all."""
    kind = random.choice(["values"] * 6 + ["bytes", "bytes", "raw"])
    if kind == "bytes":
        return change_bytes(random, content)
    if kind == "raw":
        parts = [
            b"\xff",
            b"\xef\xbb\xbf",
            b"\0",
            b"NaN",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"1" * 5000,
            b"{}",
            b"1e999",
        ]
        part, at = random.choice(parts), random.choice([0, random.randrange(len(content)), len(content)])
        spoilt = random.choice([part, content[:at] + part + content[at:], content.decode().encode("utf-16")])
        if b"null" in content and random.random() < 0.3:  # equal to a reader that takes NaN for null
            spoilt = content.replace(b"null", random.choice([b"NaN", b"1e999", b"-Infinity"]), 1)
        return spoilt, f"raw {part[:9]!r} at {at}"
    values, said = change_values(random, json.loads(content))
    if random.random() < 0.5 if reseal is None else reseal:
        return sealed(values), f"{said}, sealed again"
    return dumped(values), said


def sealed(values: dict[str, Any]) -> bytes:
    """As a person who edits a file seals it: with the project's own function where that goes so deep."""
    with contextlib.suppress(RecursionError):
        values = seal(values)
    return dumped(values)


def dumped(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()  # NaN stays NaN


# Files by their format.


def change_safetensors(random: Random, content: bytes) -> tuple[bytes, str]:
    """A header that says something else of the same data, or a length that is not the header's."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    match random.choice(["length", "header", "offsets", "overlap", "bytes"]):
        case "length":
            other = random.choice([*BOUNDS, size + 1, size - 1, len(content)])
            return struct.pack("<Q", other % 2**64) + content[8:], f"header length {other}"
        case "header":
            header, said = change_values(random, header)
        case "offsets":
            name = random.choice(sorted(header))
            if "data_offsets" not in header[name]:
                return change_bytes(random, content)
            offsets, said = header[name]["data_offsets"], f"offsets of {name}"
            offsets[random.randrange(2)] = random.choice([*BOUNDS, len(data), len(data) + 1])
        case "overlap":
            names = [name for name in header if name != "__metadata__"]
            header[random.choice(names)], said = dict(header[random.choice(names)]), "two names of the same data"
        case _:
            return change_bytes(random, content)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data, f"header: {said}"


class Forged:
    """Unpickling it would call a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def change_pickle(random: Random, content: bytes, trace: Path) -> tuple[bytes, str]:
    """A forged torch file: calls, classes that torch knows, other values, or one that unpacks to much more."""
    match kind := random.choice(["call", "values", "storage", "bomb", "plain", "bytes", "inner"]):
        case "call":
            return torch_file({"optimizers": [Forged(Path.touch, trace)]}), kind
        case "storage":
            value = Forged(
                torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 0, (10**6,), (1,), False, {}
            )
            return torch_file({"optimizers": [value], "scaler": {}}), kind
        case "plain":
            return pickle.dumps(random.choice([Forged(Path.touch, trace), [], "text", deep(100)])), kind
        case "values":
            old = {"optimizers": [{"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}], "scaler": {"scale": 8.0}}
            value, said = change_values(random, old)
            with contextlib.suppress(RecursionError):
                return torch_file(random.choice([value, [value], None, 5])), f"values {said}"
            return torch_file(deep(100)), "nested"
        case "bytes":
            return change_bytes(random, content)
    source, buffer = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = source.namelist()
    chosen = random.choice(names)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            data, packed = source.read(name), zipfile.ZIP_STORED
            if name == chosen and kind == "bomb":
                data, packed = data + bytes(64 << 20), zipfile.ZIP_DEFLATED
            elif name == chosen and data:
                data, _ = change_bytes(random, data)
            archive.writestr(name, data, packed)
    return buffer.getvalue(), f"{kind} in {chosen}"


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def change_table(random: Random, content: bytes) -> tuple[bytes, str]:
    """Another Parquet file of the columns image and label: rows, values, types, packing."""
    table = pq.read_table(pa.BufferReader(content))
    image, labels, n = table["image"].to_pylist(), table["label"].to_pylist(), len(table)
    row, options = random.randrange(n), dict[str, Any]()
    kind = random.choice(
        ["fewer", "more", "null-label", "null-image", "null-bytes", "label", "path", "text", "types", "packed", "names"]
    )
    match kind:
        case "fewer":
            image, labels = image[:row], labels[:row]
        case "more":
            image, labels = [*image, image[row]], [*labels, labels[row]]
        case "null-label":
            labels[row] = None
        case "null-image":
            image[row] = None
        case "null-bytes":
            image[row]["bytes"] = random.choice([None, b"", b"no picture", image[row]["bytes"][:50]])
        case "label":
            labels[row] = random.choice([-1, 10, 2**40, -(2**63), (labels[row] + 1) % 10])
        case "path":
            image[row]["path"] = random.choice([None, "", "x\ny", "../../etc/passwd", "x" * 100_000])
        case "packed":
            options = {"compression": random.choice(["snappy", "zstd", "gzip", "lz4", "brotli"])}
            options |= {"use_dictionary": random.random() < 0.5, "data_page_version": random.choice(["1.0", "2.0"])}
    binary = pa.large_binary() if kind == "types" and random.random() < 0.5 else pa.binary()
    struct_type = pa.struct([("bytes", binary), ("path", pa.string())])
    label_type = random.choice([pa.int8(), pa.float64(), pa.string()]) if kind == "types" else pa.int64()
    found = pa.array(labels).cast(label_type) if kind == "types" else pa.array(labels, label_type)
    columns = {"image": pa.array(image, struct_type), "label": found}
    if kind == "text":
        columns["image"] = pa.array(["text"] * n)
    if kind == "names":
        columns = random.choice([{"picture": columns["image"], "label": found}, {"label": found}, {"image": found}])
    made = pa.table(columns).replace_schema_metadata(table.schema.metadata)
    if kind == "names" and "label" in columns and random.random() < 0.5:
        metadata = random.choice([b"{", b"[]", b"[" * 5000, b'{"info": {"features": {"label": {"names": [1, 2]}}}}'])
        made = table.replace_schema_metadata({b"huggingface": metadata})
    buffer = io.BytesIO()
    pq.write_table(made, buffer, row_group_size=random.choice([1, 5, 1000]), **{"compression": "none", **options})
    return buffer.getvalue(), f"table: {kind} at row {row}"


def change_parquet(random: Random, path: Path, kind: str) -> str:
    """Damages a Parquet file by `kind`: its bytes, or the table in it. Says how."""
    changed, said = {"bytes": change_bytes, "table": change_table}[kind](random, path.read_bytes())
    path.write_bytes(changed)
    return said


def change_zip(random: Random, content: bytes) -> tuple[bytes, str]:
    """Fields of a zip archive's headers, or any bytes."""
    marks = [b"PK\1\2", b"PK\3\4", b"PK\5\6"]
    starts = [i for i in range(len(content) - 30) if content[i : i + 4] in marks]
    if not starts or random.random() < 0.3:
        return change_bytes(random, content)
    at, size = random.choice(starts) + 2 * random.randrange(2, 22), random.choice([2, 4])
    value = random.choice([*BOUNDS, len(content)]) % (1 << 8 * size)
    return content[:at] + value.to_bytes(size, "little") + content[at + size :], f"zip field at {at}: {value}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put_json(path: Path, values: dict[str, Any]) -> None:
    path.write_bytes(sealed(values))


def change_file(random: Random, path: Path, outside: Path) -> str:
    """What happens to a file as a whole: gone, empty, a folder, a link, other bytes."""
    kind = random.choice(["bytes"] * 12 + ["removed", "empty", "folder", "link", "own link", "broken link"])
    content = path.read_bytes() if path.exists() else b""
    if kind == "bytes" and content:
        changed, said = change_bytes(random, content)
        if path.is_symlink():  # what it leads to stays
            path.unlink()
        path.write_bytes(changed)
        return f"{path.name}: {said}"
    path.unlink(missing_ok=True)
    match kind:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(outside)
        case "own link":
            path.symlink_to(path.name)
        case "broken link":
            path.symlink_to("nowhere")
    return f"{path.name}: {kind}"
