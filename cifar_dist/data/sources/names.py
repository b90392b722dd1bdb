"""What the names of files and folders say: splits, pictures, and what is no data."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cifar_dist.data.sources.formats import RAW_SUFFIXES, SUFFIXES

# The words by which the library `datasets` knows splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
# Pillow reads these, or says with a sentence why it does not.
PICTURES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm"),
    ".hif",
}
# A split whose pictures lie in a single folder of such a name has no labels.
UNLABELLED = {"unknown", "unlabeled", "unlabelled"}
NO_CLASS = UNLABELLED | {"images", "image", "imgs", "img", "pictures", "photos", "data", "all"}
# What lies beside pictures and is none. Files with other suffixes are opened to see whether they are pictures.
NOTES = {
    *(".txt", ".md", ".rst", ".pdf", ".doc", ".docx", ".html", ".htm", ".rtf", ".odt", ".log", ".bib", ".url"),
    *(".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".db", ".sqlite"),
    *(".py", ".ipynb", ".sh", ".bat", ".m", ".js", ".css", ".lock", ".md5", ".sha256", ".cls", ".crc"),
}
# Kinds that are told by content, with formats.py's sentence: bad pictures, not notes.
UNREAD = {".exr", ".dds", ".qoi", ".hdr", ".xcf", ".sgi", ".fits", ".icns", ".jxr", ".wdp", ".hdp", ".pam", ".wmf"}
PICTURES |= (UNREAD | {*RAW_SUFFIXES, *SUFFIXES}) - NOTES
DATA = {
    *(".parquet", ".arrow", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".pkl", ".pickle", ".pt", ".tfrecord", ".bin"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".mp3", ".wav"),
}
SYSTEM = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "@eadir", "$recycle.bin", "system volume information"}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "__pycache__"}
STRAY, NOTE, OTHER_DATA = "files of the system or of tools", "notes and other files", "data files of another kind"
UNKNOWN = "files of an unknown kind"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file that is not stored. `kind` says what it is, `reason` why it is left out."""

    path: str
    kind: str
    reason: str
    split: str = ""
    class_name: str = ""


def suffix_of(name: str) -> str:
    base = name.rpartition("/")[2]
    return "." + base.rpartition(".")[2].lower() if "." in base[1:] else ""


def kind_of(name: str) -> str | None:
    """Returns what a file is that is no picture by its name, '' for a picture, None if only its content can tell."""
    *folders, base = name.split("/")
    hidden = any(part.startswith(".") for part in (*folders, base))
    if hidden or base.lower() in SYSTEM or any(folder.lower() in SYSTEM_FOLDERS for folder in folders):
        return STRAY
    suffix = suffix_of(base)
    if suffix in PICTURES:
        return ""
    return NOTE if suffix in NOTES else OTHER_DATA if suffix in DATA else None


def splits_in(name: str) -> list[str]:
    """Returns the splits whose words a name holds, in any case and between other signs: 'seg_Train', 'testset'."""
    return [
        split
        for split in ("test", "validation", "train")
        if re.search(rf"(^|[-._ 0-9])({'|'.join(SPLIT_WORDS[split])})(set)?($|[-._ 0-9])", name.lower())
    ]


def split_of_folder(name: str) -> str | None:
    """Returns the split that a folder's name names, None if it names none or several."""
    found = splits_in(name) if "/" not in name else []
    return found[0] if len(found) == 1 else None


def split_in(name: str) -> str | None:
    """Returns the split that a path names, as `datasets` looks for it: the last folder or file that names one."""
    return next((splits_in(part)[0] for part in reversed(name.split("/")) if splits_in(part)), None)


def listing(names: Iterable[str], limit: int = 3) -> str:
    """Returns 'a, b, c and 7 more'."""
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
