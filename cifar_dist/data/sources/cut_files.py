"""Finds files that were cut off where Pillow does not see it, and would show other pixels or turn them otherwise."""

import struct

from PIL import TiffImagePlugin

COMPRESSION, OFFSETS, LENGTHS = 259, 273, 279  # TIFF tags
OLD_JPEG = 6  # a compression of TIFF
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
TRUNCATED = "image file is truncated: it ends before its data do"
CODESTREAM_START, CODESTREAM_END = b"\xff\x4f", b"\xff\xd9"  # of JPEG 2000


def refuse_cut_tiff(image: TiffImagePlugin.TiffImageFile, content: bytes) -> None:
    """Raises ValueError for a TIFF that was cut off where Pillow does not see it: in its tags or in old JPEG data."""
    ends = tag_ends(content)
    if image.tag_v2.get(COMPRESSION) == OLD_JPEG:
        strips = zip(image.tag_v2.get(OFFSETS, ()), image.tag_v2.get(LENGTHS, ()), strict=False)
        ends += [start + length for start, length in strips]
    if max(ends) > len(content):
        raise ValueError(TRUNCATED)


def tag_ends(content: bytes) -> list[int]:
    """Returns where the first directory of a TIFF ends, and where the data of its tags end, in bytes."""
    order = "<" if content.startswith(b"II") else ">"
    is_big = content[2:4] in (b"+\0", b"\0+")
    count, entry, place = (order + kinds for kinds in (("Q", "HHQ", "Q") if is_big else ("H", "HHI", "I")))
    size_of_entry, inline = (20, 8) if is_big else (12, 4)
    (start,) = struct.unpack_from(place, content, 8 if is_big else 4)
    first = start + struct.calcsize(count)
    ends = [first + size_of_entry * struct.unpack_from(count, content, start)[0]]
    for at in range(first, min(ends[0], len(content) - size_of_entry + 1), size_of_entry):
        _, kind, num_values = struct.unpack_from(entry, content, at)
        num_bytes = num_values * TYPE_BYTES.get(kind, 0)
        if num_bytes > inline:
            ends.append(num_bytes + struct.unpack_from(place, content, at + struct.calcsize(entry))[0])
    return ends


def refuse_cut_jpeg_2000(content: bytes) -> None:
    """Raises ValueError for a JPEG 2000 file whose pixels lack their end: missing tiles would be black."""
    end = len(content) if content.startswith(CODESTREAM_START) else codestream_end(content)
    if end > len(content) or not content[:end].rstrip(b"\0").endswith(CODESTREAM_END):
        raise ValueError(TRUNCATED)


def codestream_end(content: bytes) -> int:
    """Returns where the box of the pixels of a JP2 file ends, or 0 if there is none."""
    position = 0
    while position + 16 <= len(content):
        length, kind, long_length = struct.unpack_from(">I4sQ", content, position)
        length = {0: len(content) - position, 1: long_length}.get(length, length)
        if kind == b"jp2c":
            return position + length
        position += max(length, 8)
    return 0
