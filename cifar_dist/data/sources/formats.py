"""The kinds of files that are read, and names for the kinds that are not, so that a message can say what a file is."""

from pathlib import PurePath

# As Pillow names them. It reads MPO, a JPEG of several pictures, as a kind of JPEG.
READ = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
READ_NAMES = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, JPEG 2000 and PPM"
STORED = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # kept as they are where DALI decodes them right; others become PNG

CONVERT = "convert it to JPEG or PNG"
FRAMES = "save its frames as JPEG or PNG"
STARTS = {  # the first bytes -> (what the file is, what to do)
    b"8BPS": ("a Photoshop file (PSD)", CONVERT),
    b"%PDF": ("a PDF document", CONVERT),
    b"%!PS": ("a PostScript file", CONVERT),
    b"\xc5\xd0\xd3\xc6": ("a PostScript file", CONVERT),
    b"\0\0\1\0": ("an icon (ICO)", CONVERT),
    b"icns": ("an icon (ICNS)", CONVERT),
    b"\xff\x0a": ("a JPEG XL file", CONVERT),
    b"\0\0\0\x0cJXL ": ("a JPEG XL file", CONVERT),
    b"II\xbc": ("a JPEG XR file", CONVERT),
    b"qoif": ("a QOI file", CONVERT),
    b"DDS ": ("a DDS texture", CONVERT),
    b"v/1\1": ("an OpenEXR file", CONVERT),
    b"#?RADIANCE": ("a Radiance HDR file", CONVERT),
    b"gimp xcf": ("a GIMP file (XCF)", CONVERT),
    b"\x01\xda": ("an SGI file", CONVERT),
    b"SIMPLE  =": ("a FITS file", CONVERT),
    b"\xd7\xcd\xc6\x9a": ("a Windows metafile", CONVERT),
    b"P7\n": ("a PAM file", CONVERT),
    b"FUJIFILMCCD-RAW": ("a camera's raw file", CONVERT),
    b"IIRO": ("a camera's raw file", CONVERT),
    b"IIRS": ("a camera's raw file", CONVERT),
    b"IIU\0": ("a camera's raw file", CONVERT),
    b"FOVb": ("a camera's raw file", CONVERT),
    b"\x1aE\xdf\xa3": ("a video", FRAMES),
    b"PK\3\4": ("a ZIP archive", "unpack it"),
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"\x93NUMPY": ("a NumPy array", CONVERT),
    b"\x89HDF": ("an HDF5 file", CONVERT),
    b"PAR1": ("a Parquet file", "use --source parquet"),
    b"version https://git-lfs": ("a Git LFS pointer, not the picture", "run git lfs pull"),
}
READ_STARTS = {
    **{b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"BM": "BMP", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"},
    **{b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000"},
    **{b"P%d" % i: "PPM" for i in range(1, 7)},
}
BRANDS = {  # of files that begin with a box `ftyp`
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC file"),
    b"crx ": "a camera's raw file",
}
RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
SUFFIXES = {
    **{".tga": "a TGA file", ".pcx": "a PCX file", ".svg": "an SVG drawing", ".svgz": "an SVG drawing"},
    **{".heic": "a HEIC file", ".heif": "a HEIC file", ".ico": "an icon (ICO)", ".psd": "a Photoshop file (PSD)"},
    **{".jxl": "a JPEG XL file", ".pdf": "a PDF document", ".eps": "a PostScript file", ".dcm": "a DICOM file"},
}


def raw_picture(content: bytes, where: str) -> bool:
    """Whether the file is a camera's raw file that looks like a TIFF: its first picture may be a mere preview."""
    is_tiff = content[:4] in (b"II*\0", b"MM\0*")
    return is_tiff and (content[8:10] == b"CR" or PurePath(where).suffix.lower() in RAW_SUFFIXES)


def unread_kind(content: bytes, where: str) -> tuple[str, str] | None:
    """Returns (what the file is, what to do) for a file that is not read, by content or else suffix; None: unknown."""
    for start, said in STARTS.items():
        if content.startswith(start):
            return said
    head = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "an SVG drawing", CONVERT
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a picture", "download it again"
    if content[128:132] == b"DICM":
        return "a DICOM file", CONVERT
    if content[4:8] == b"ftyp" and content[8:12] in BRANDS:
        return BRANDS[content[8:12]], CONVERT
    if content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        return "a video", FRAMES
    if content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis"):
        return "a video", FRAMES
    suffix = PurePath(where).suffix.lower()
    name = "a camera's raw file" if suffix in RAW_SUFFIXES else SUFFIXES.get(suffix)
    return (name, CONVERT) if name else None


def unread_sentence(content: bytes, where: str) -> str:
    """Returns the sentence that says what a file is that Pillow does not know, or that is not read."""
    if known := unread_kind(content, where):
        return f"{where} is {known[0]}, which is not read; {known[1]}"
    read = next((name for start, name in READ_STARTS.items() if content.startswith(start)), None)
    read = "WebP" if content[:4] + content[8:12] == b"RIFFWEBP" else "AVIF" if content[4:8] == b"ftyp" else read
    if read:
        return f"{where} is not a readable image: it begins like a {read} file, with a header that is not understood"
    return f"{where} is no image of a kind that is read: {READ_NAMES}; {CONVERT}"
