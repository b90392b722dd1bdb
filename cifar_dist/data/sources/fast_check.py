"""Knows files that DALI as good as certainly decodes to what Pillow shows upright, without decoding them.

Such a plain file has a header of the usual kind, no metadata that turns it, and ends where its header says.
Damage within the compressed pixels is not seen, but for checksums of PNG and stray markers of JPEG.
"""

import re
import struct
import zlib
from typing import NamedTuple

BASELINE, PROGRESSIVE, HUFFMAN, END, SCAN, QUANTIZERS = 0xC0, 0xC2, 0xC4, 0xD9, 0xDA, 0xDB
EXIF_OR_XMP, MANY_PICTURES, ADOBE, COMMENT = 0xE1, 0xE2, 0xEE, 0xFE
APPLICATION = range(0xE0, 0xF0)
JPEG_MARKER = re.compile(rb"\xff[^\x00]")  # in compressed pixels, a zero follows each byte of 255
COMPONENTS = re.compile(rb"\x01[\x11\x21\x22][\x00-\x03]\x02\x11[\x00-\x03]\x03\x11[\x00-\x03]")  # YCbCr 444, 422, 420
WHOLE_SCAN = re.compile(rb"\x03\x01[\x00\x01\x10\x11]\x02[\x00\x01\x10\x11]\x03[\x00\x01\x10\x11]\x00\x3f\x00")
ORIENTATION, SHORT = 0x0112, 3
XMP_TURN = re.compile(rb'(?<!</tiff:)Orientation(?!="1"|>1<)')
PNG_CHUNKS = {b"IDAT", b"IEND", b"pHYs", b"tIME", b"sRGB", b"gAMA", b"cHRM", b"iCCP", b"bKGD", b"sBIT", b"tEXt"}
PNG_TEXTS = {  # harmless keywords; others may hold EXIF
    *(b"Author", b"Comment", b"Copyright", b"Creation Time", b"Description", b"Software", b"Source", b"Title"),
    *(b"date:create", b"date:modify", b"date:timestamp"),
}


class Plain(NamedTuple):
    """The kind and the size of a plain file."""

    encoding: str
    height: int
    width: int


def plain_file(content: bytes) -> Plain | None:
    """Returns kind and size of a plain JPEG, PNG, WebP or BMP file; None if only decoding shows whether it is good."""
    kinds = {b"\xff\xd8": plain_jpeg, b"\x89P": plain_png, b"RI": plain_webp, b"BM": plain_bmp}
    if (kind := kinds.get(content[:2])) is None:
        return None
    try:
        found = kind(content)
    except (struct.error, IndexError):  # it ends within its header
        return None
    return found if found and found.height > 0 and found.width > 0 else None


def plain_jpeg(content: bytes) -> Plain | None:
    """8-bit YCbCr, baseline in one scan or progressive, without restarts, upright, and nothing behind its end."""
    position, frame, num_exif, seen = 2, None, 0, set()
    while True:
        zero, marker, length = struct.unpack_from(">BBH", content, position)
        data = content[position + 4 : position + 2 + length]
        position += 2 + length
        seen.add(marker)
        if zero != 0xFF or position > len(content) - 2:
            return None
        if marker in (BASELINE, PROGRESSIVE) and frame is None and len(data) == 15 and COMPONENTS.fullmatch(data, 6):
            frame = marker, *struct.unpack_from(">BHHB", data)
        elif marker == SCAN:
            break
        elif marker == EXIF_OR_XMP:
            num_exif += data.startswith(b"Exif")
            if num_exif > 1 or not is_upright(data):
                return None
        elif not is_harmless(marker, data):
            return None
    if frame is None or frame[1] != 8 or frame[4] != 3 or not seen >= {HUFFMAN, QUANTIZERS}:
        return None
    if frame[0] == BASELINE and not WHOLE_SCAN.fullmatch(data):
        return None
    return Plain("JPEG", frame[2], frame[3]) if ends_whole(content, position, frame[0] == PROGRESSIVE) else None


def is_harmless(marker: int, data: bytes) -> bool:
    """Whether a segment before the pixels neither changes colours nor says that more pictures follow."""
    if marker == ADOBE:
        return not data.startswith(b"Adobe") or data[11:12] == b"\1"  # 1: YCbCr
    if marker == QUANTIZERS:
        return len(data) % 65 == 0 and all(kind < 16 for kind in data[::65])  # of 8 bits
    if marker == MANY_PICTURES:
        return not data.startswith(b"MPF")
    return are_tables(data) if marker == HUFFMAN else marker in APPLICATION or marker == COMMENT


def are_tables(data: bytes) -> bool:
    """Whether a segment holds whole Huffman tables: a number, 16 counts of codes, and as many values."""
    position = 0
    while position < len(data):
        position += 17 + sum(data[position + 1 : position + 17])
    return position == len(data)


def is_upright(data: bytes) -> bool:
    """Whether EXIF or XMP, as a JPEG holds it, is well formed and names no orientation but 1."""
    if not data.startswith(b"Exif"):
        return XMP_TURN.search(data) is None
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[6:10])
    if data[4:6] != b"\0\0" or order is None:
        return False
    (start,) = struct.unpack_from(f"{order}I", data, 10)
    (num_tags,) = struct.unpack_from(f"{order}H", data, 6 + start)
    tags = data[8 + start : 8 + start + 12 * num_tags]
    if len(tags) != 12 * num_tags:
        return False
    found = [entry[1:4] for entry in struct.iter_unpack(f"{order}HHIHH", tags) if entry[0] == ORIENTATION]
    return found in ([], [(SHORT, 1, 1)])


def ends_whole(content: bytes, position: int, progressive: bool) -> bool:
    """Whether the pixels from `position` on run to the one end of image, at the file's end."""
    while found := JPEG_MARKER.search(content, position):
        marker, position = content[found.start() + 1], found.end()
        if marker == END:
            return position == len(content)
        if not progressive or marker not in (HUFFMAN, SCAN):
            return False
        position += struct.unpack_from(">H", content, position)[0]
    return False


def plain_png(content: bytes) -> Plain | None:
    """8-bit RGB, not interlaced, of known chunks with right checksums, and nothing behind its end."""
    view = memoryview(content)
    if content[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or content[24:29] != b"\x08\x02\0\0\0":
        return None
    position, kind, num_pixel_chunks = 8, b"IHDR", 0
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", content, position)
        end = position + 12 + length
        kind = content[position + 4 : position + 8]
        (checksum,) = struct.unpack_from(">I", content, end - 4)
        if (position > 8 and kind not in PNG_CHUNKS) or zlib.crc32(view[position + 4 : end - 4]) != checksum:
            return None
        if kind == b"tEXt" and content[position + 8 : end - 4].partition(b"\0")[0] not in PNG_TEXTS:
            return None
        num_pixel_chunks += kind == b"IDAT"
        position = end
    width, height = struct.unpack_from(">II", content, 16)
    return Plain("PNG", height, width) if position == len(content) and num_pixel_chunks else None


def plain_webp(content: bytes) -> Plain | None:
    """One lossy frame and nothing else."""
    size, kind, length = struct.unpack_from("<I8sI", content, 4)
    tag = int.from_bytes(content[20:23], "little")
    width, height = struct.unpack_from("<HH", content, 26)
    is_whole = size == len(content) - 8 and length + length % 2 == size - 12
    is_frame = kind == b"WEBPVP8 " and content[23:26] == b"\x9d\x01\x2a" and tag & 0x11 == 0x10 and tag >> 5 < length
    return Plain("WEBP", height, width) if is_whole and is_frame and max(width, height) < 1 << 14 else None


def plain_bmp(content: bytes) -> Plain | None:
    """24 bits a pixel, not compressed, of the exact size."""
    size, _, start, header, width, height, planes, bits, compression = struct.unpack_from("<IIIIiiHHI", content, 2)
    length = start + (width * 3 + 3) // 4 * 4 * abs(height)
    is_plain = (start, header, planes, bits, compression) == (54, 40, 1, 24, 0)
    return Plain("BMP", abs(height), width) if is_plain and size == length == len(content) else None
