"""Checks that an HDF5 weights file holds only its own numbers. HDF5 can also follow links to files and load plugins."""

import io
import math
import mmap
import struct
from pathlib import Path

import h5py

from cifar_dist.errors import UserError

# HDF5's own filters, and h5py's LZF. Any other filter is a plugin: code that HDF5 would load from the local disk.
FILTERS = {1: "deflate", 2: "shuffle", 3: "Fletcher32", 4: "szip", 5: "n-bit", 6: "scale-offset", 32000: "LZF"}
MAX_DEPTH = 64  # of groups; Keras nests only a few
MAX_CHUNK_BYTES = 64 << 20  # HDF5 allocates memory for a whole chunk, even to read a single value
HEAP = b"GCOL\x01\0\0\0"  # the start of a global heap, which holds the texts of attributes


def check_heaps(source: str | Path | io.BytesIO, path: str | Path) -> None:
    """Raises UserError if the file's heaps are damaged, because HDF5 would search them forever.

    `source` is the file at `path`, or its content. HEAP may also occur among the values by chance, at one in 2^64
    positions.
    """
    if isinstance(source, io.BytesIO):
        check_heaps_in(source.getvalue(), path)
        return
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        check_heaps_in(content, path)


def check_heaps_in(content: bytes | mmap.mmap, path: str | Path) -> None:
    at = content.find(HEAP)
    while at >= 0:
        if not is_heap(content, at):
            refuse(path, f"byte {at}", "begins a damaged heap of texts")
        at = content.find(HEAP, at + 1)


def is_heap(content: bytes | mmap.mmap, at: int) -> bool:
    """Whether the objects of the heap at `at` fill it. Each object has a number, from 1, and a size; number 0 is free
    space."""
    place, end = at + 16, at + int.from_bytes(content[at + 8 : at + 16], "little")
    if end > len(content):
        return False
    while end - place >= 16:
        number, size = struct.unpack_from("<H6xQ", content, place)
        if number == 0:
            return size == end - place
        place += 16 + -(-size // 8) * 8
    return place <= end


def check_file(file: h5py.File, path: str | Path) -> None:
    """Raises UserError if reading the file would make HDF5 open other files, load plugins, loop or exhaust memory.

    Visits the whole file without reading any values. The error names the place in the file.
    """
    seen = {h5py.h5o.get_info(file.id).addr}
    waiting = [(file["/"], 1)]
    while waiting:
        group, depth = waiting.pop()
        for name in group:
            link, where = group.get(name, getlink=True), f"{group.name.rstrip('/')}/{name}".lstrip("/")
            if not isinstance(link, h5py.HardLink):
                refuse(path, where, f"is a link to {link.path} in {getattr(link, 'filename', 'the same file')}")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                refuse(path, where, "is in the file twice: two links lead to it")
            seen.add(address)
            if isinstance(item, h5py.Group):
                if depth == MAX_DEPTH:
                    refuse(path, where, f"lies more than {MAX_DEPTH} groups deep")
                waiting.append((item, depth + 1))
            elif not isinstance(item, h5py.Dataset):
                refuse(path, where, "is neither a group nor a dataset")
            elif fault := fault_of(item):
                refuse(path, where, fault)


def refuse(path: str | Path, where: str, fault: str) -> None:
    what = "".join(c if c.isprintable() else "?" for c in f"{where} {fault}")  # for names with control characters
    raise UserError(f"{path}: {what}, which no weights file of Keras has; save the weights again with Keras")


def fault_of(dataset: h5py.Dataset) -> str | None:
    """Returns why a dataset must not be read, or None if it may be read."""
    settings = dataset.id.get_create_plist()
    if settings.get_external_count():
        return f"keeps its values in another file ({settings.get_external(0)[0].decode(errors='replace')})"
    if dataset.is_virtual:
        return "is put together from other datasets"
    if dataset.dtype.kind not in "fiub":
        return f"holds values of the type {dataset.dtype}, not numbers"
    if dataset.shape is None:
        return "has no shape"
    for i in range(settings.get_nfilters()):
        if (code := settings.get_filter(i)[0]) not in FILTERS:
            return f"is packed by the filter {code}, a plugin"
    num_values = math.prod(dataset.chunks or ())
    if num_values * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        return f"is stored in chunks of {num_values} values"
    return None
