"""Files that were cut off: refused with a sentence, or shown as the whole file."""

import io
import struct

import numpy as np
import pytest
from odd_pictures import saved
from PIL import Image

from cifar_dist.data.sources.picture import Rules, show
from cifar_dist.errors import UserError

FULL = Rules()

TURNED = saved("TIFF", compression="tiff_lzw", tiffinfo={274: 6})  # its tags lie at the end
WHOLE = {format: saved(format) for format in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")}


@pytest.mark.parametrize("name", [*WHOLE, "turned TIFF", "JP2 codestream"])
def test_a_file_that_was_cut_off_is_refused_or_shown_as_the_whole(name: str):
    content = (WHOLE | {"turned TIFF": TURNED, "JP2 codestream": saved("JPEG2000", no_jp2=True)})[name]
    whole, taken = show(content, "x", FULL).pixels, []
    for length in range(1, len(content)):
        try:
            shown = show(content[:length], "x", FULL)
        except UserError:
            continue
        taken.append(length)
        assert np.array_equal(shown.pixels, whole), length
    assert len(taken) < 10


@pytest.mark.parametrize("big", [False, True])
def test_a_tag_of_a_tiff_lies_within_the_file(big: bool):
    """Pillow forgets this tag and all behind it, for example that colours are multiplied by alpha."""
    content = saved("TIFF", tiffinfo={305: "x" * 20}, big_tiff=big)
    tag = struct.pack("<HHQ" if big else "<HHI", 305, 2, 21)
    at = content.index(tag) + len(tag)

    def pointing(place: int) -> bytes:
        data = struct.pack("<Q" if big else "<I", place)
        return content[:at] + data + content[at + len(data) :]

    assert show(pointing(len(content) - 21), "x", FULL).pixels.shape == (16, 24, 3)
    with pytest.raises(UserError, match=r"x\.tif is not a readable image: image file is truncated"):
        show(pointing(len(content) - 20), "x.tif", FULL)


def test_old_jpeg_data_of_a_tiff_lies_within_the_file():
    content = saved("TIFF", compression="jpeg")
    kind = struct.pack("<HHII", 259, 3, 1, 7)  # compression: 7 is JPEG, 6 its old style
    tags = Image.open(io.BytesIO(content)).tag_v2
    (start,), (length,) = tags[273], tags[279]
    lengths = [struct.pack("<HHII", 279, 4, 1, n) for n in (length, len(content) - start + 1)]
    longer = content.replace(*lengths)
    assert content.count(kind) == 1
    assert longer != content
    with pytest.raises(UserError, match=r"x\.tif is not a readable image: image file is truncated"):
        show(longer.replace(kind, struct.pack("<HHII", 259, 3, 1, 6)), "x.tif", FULL)
