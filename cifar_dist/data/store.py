"""Writes a data set, Parquet files, a manifest and a data card, completely or not at all."""

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from pyarrow import fs

from cifar_dist.data.assembly import card_of, made_of, manifest_of, moves
from cifar_dist.data.card import CARD, read_card, write_card
from cifar_dist.data.check import Checker
from cifar_dist.data.left_out import LEFT_OUT, BadPictures
from cifar_dist.data.making import make_part
from cifar_dist.data.manifest import MANIFEST, OLD_MANIFEST, Manifest, has_old_manifest, read_manifest
from cifar_dist.data.parts import PREPARING, Made, Part, made_before, noted, parts_of, sha256_of
from cifar_dist.data.sources.picture import Rules
from cifar_dist.data.sources.source import Source
from cifar_dist.environment import frugal_memory
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, is_sealed, to_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

REPLACED = "_manifest.json.replaced"  # in PREPARING: the manifest of the data set that is being replaced
DATA_FILE = re.compile(r"(train|validation|test)-\d{5}\.parquet")
UNFINISHED = re.compile(  # in PREPARING; an earlier version wrote the data files under their names
    rf"({DATA_FILE.pattern}|part-[0-9a-f]{{64}}\.(parquet|facts|json)|_manifest\.json(\.replaced)?|start-[0-9a-f]{{8}})"
    r"(\.[0-9a-f]{8}\.tmp)?"
)
Passed = Callable[[int], None]  # is told how many further pictures are done
MakeAll = Callable[[list[Part], str, Passed], Iterator[Made]]


def one_by_one(parts: list[Part], uri: str, passed: Passed) -> Iterator[Made]:
    """Makes the parts in this process, in order."""
    checker = Checker()
    try:
        with frugal_memory():
            for part in parts:
                yield make_part(part, uri, checker, passed)
    finally:
        checker.stop()


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a data set is prepared.

    rules: how pictures are read. near_duplicates: whether to look for pictures that look alike. skip_bad: leave bad
    pictures out, up to `max_bad_share` of a class. overwrite: replace another data set, or files of the same names.
    make_all: makes the parts, in this process or in many. show: gets the numbers of pictures done and left out."""

    rules: Rules = field(default_factory=Rules)
    near_duplicates: bool = False
    skip_bad: bool = False
    max_bad_share: float = 0.01
    overwrite: bool = False
    make_all: MakeAll = one_by_one
    show: Callable[[int, int], None] = lambda _done, _bad: None


def prepare(source: Source, uri: str, how: Preparation | None = None) -> tuple[Manifest, bool]:
    """Writes the source as a data set. Returns its manifest and whether anything was written.

    Files are written into a folder PREPARING and moved when complete, the manifest last. What an interrupted
    preparation has completed there is used. An existing data set is left alone if it is equal and complete. Another
    data set, and files of the same names that are not of this program, are replaced only with `overwrite`; without it
    they raise UserError.
    """
    how, folder = how or Preparation(), Folder(uri)
    if folder.fs.get_file_info(folder.path).type == fs.FileType.File:
        raise UserError(f"{uri} is a file; name a folder with --out")
    parts = list(parts_of(source, how.rules, near_duplicates=how.near_duplicates, skip_bad=how.skip_bad))
    old, has_old_name = old_manifest(folder, how.overwrite)
    if old and is_made_of(old, folder, parts, how.skip_bad) and is_whole(folder, old):
        clear_unfinished(folder, [])
        return old, False
    clear_unfinished(folder, parts)
    if not how.overwrite:
        refuse_foreign(folder, old)
    if old:
        refuse_other(folder, old, source, how.skip_bad)
    with claimed(folder) as claim:
        bad = BadPictures(source, how.max_bad_share)
        made = all_made(parts, folder, how, bad)
        manifest = manifest_of(source, parts, made)
        card = card_of(source, manifest, folder, parts, made, bad)
        if old is not None and (old.class_names, old.splits) != (manifest.class_names, manifest.splits):
            folder.delete(PREPARING)  # or it would keep a copy of what is not wanted here
            raise UserError(other(folder, old))
        is_there = old is not None and old.sha256 == manifest.sha256 and is_whole(folder, old) and folder.exists(CARD)
        claim.check()
        if not is_there:
            folder.write(f"{PREPARING}/{MANIFEST}", to_json(asdict(manifest)))  # clear_unfinished reads it
            claim.is_moving = True
            publish(folder, manifest, moves(parts, made), has_old_name)
        write_card(folder, card)  # first: it tells a next start that the list is not foreign
        write_left_out(folder, bad)
        if not is_there:
            folder.write(MANIFEST, to_json(asdict(manifest)))
        claim.is_moving = False
        folder.delete(PREPARING)
        return manifest, not is_there


class Claim:
    """The mark in PREPARING of the one job that prepares, and what it has seen in the folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.name = folder, f"{PREPARING}/start-{uuid.uuid4().hex[:8]}"
        folder.create(PREPARING)
        folder.write(self.name, b"")
        self.seen = folder.exists(MANIFEST), data_files(folder)
        self.is_moving = False  # the old files are on their way out: a new start cleans up

    def check(self) -> None:
        """Raises UserError if another job has begun or written meanwhile."""
        if not self.folder.exists(self.name) or self.seen != (self.folder.exists(MANIFEST), data_files(self.folder)):
            raise UserError(f"another job has written to {self.folder.uri} meanwhile; run the same command again")


@contextlib.contextmanager
def claimed(folder: Folder) -> Iterator[Claim]:
    """Claims the folder. Leaves the parts that are complete in PREPARING if an error comes between."""
    claim = None
    try:
        claim = Claim(folder)
        yield claim
    except FileNotFoundError as error:
        raise UserError(f"{error} while {folder.uri} was written; is another job preparing the same folder?") from error
    finally:
        if claim and not claim.is_moving and folder.exists(claim.name):  # else PREPARING belongs to another job
            folder.delete(claim.name)
            if not any(name.endswith(".json") for name in folder.names(PREPARING)):  # else the next start goes on
                folder.delete(PREPARING)


def all_made(parts: list[Part], folder: Folder, how: Preparation, bad: BadPictures) -> list[Made]:
    """Returns what was made of each part, now or before. Shows the progress."""
    found: dict[str, Made] = {}
    num_done = 0

    def passed(num_pictures: int) -> None:
        nonlocal num_done
        num_done += num_pictures
        how.show(num_done, len(bad))

    by_key = {part.key: part for part in parts}
    for part in parts:
        if made := made_before(folder, part):
            found[part.key] = made
            bad.add(part, made)
    passed(sum(len(by_key[key].items) for key in found))  # at once: this is not the speed
    left = [part for part in parts if part.key not in found]
    for made in how.make_all(left, folder.uri, passed):
        found[made.key] = made
        bad.add(by_key[made.key], made)
        passed(0)
    return [found[part.key] for part in parts]


def is_made_of(manifest: Manifest, folder: Folder, parts: list[Part], skip_bad: bool) -> bool:
    """Whether the data set was made of these very parts, so that they need not be read again."""
    if manifest.num_skipped and not skip_bad:
        return False
    try:
        card = read_card(folder.uri, manifest)
    except UserError:  # it is damaged, and will be written anew
        return False
    return card is not None and card["made_of"] == made_of(parts)


def old_manifest(folder: Folder, overwrite: bool) -> tuple[Manifest | None, bool]:
    """Returns (manifest of the existing data set, whether its file has the earlier name).

    The manifest is None if there is no data set, and if it is to be overwritten.
    """
    try:
        has_old_name = has_old_manifest(folder)
        has_manifest = folder.exists(MANIFEST) or has_old_name
        return (read_manifest(folder.uri) if has_manifest and not overwrite else None), has_old_name
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from error


def refuse_other(folder: Folder, old: Manifest, source: Source, skip_bad: bool) -> None:
    """Raises UserError if the data set `old` can only be another one, before the pictures are read."""
    counts = {split: len(items) for split, items in source.splits.items()}
    same = all(old.num_rows(split) == counts.get(split) for split in old.splits) and len(counts) == len(old.splits)
    if old.class_names != source.class_names or not (same or skip_bad or old.num_skipped):
        raise UserError(other(folder, old))


def other(folder: Folder, old: Manifest) -> str:
    return f"{folder.uri} already holds another data set ({old.source}); use --overwrite or another --out"


def refuse_foreign(folder: Folder, old: Manifest | None) -> None:
    """Raises UserError for files that have names of data files but are not in the manifest `old`."""
    foreign = [name for name in data_files(folder) if name not in file_names(old)]
    if old is None and not is_own_card(folder):
        foreign += [name for name in (CARD, LEFT_OUT) if folder.exists(name)]
    if foreign:
        raise UserError(
            f"{join_uri(folder.uri, foreign[0])} is in the way: no data set of this program names it, so it is left "
            "alone; use another --out, or --overwrite to replace such files"
        )


def is_own_card(folder: Folder) -> bool:
    """Whether the folder's data card was written by this program, perhaps in a preparation that was killed."""
    try:
        return is_sealed(from_json(folder.read(CARD)))
    except (FileNotFoundError, ValueError):
        return False


def publish(folder: Folder, manifest: Manifest, moves: list[tuple[str, str]], has_old_name: bool) -> None:
    """Replaces the old files by the new files in PREPARING. Afterwards the folder has no manifest yet."""
    replaced = data_files(folder)
    for name in [MANIFEST, *[OLD_MANIFEST] * has_old_name]:
        if folder.exists(name):
            folder.move(name, f"{PREPARING}/{REPLACED}")
    for name in replaced:
        folder.delete(name)
    assert [name for _, name in moves] == file_names(manifest)
    for part, name in moves:
        folder.move(part, name)


def write_left_out(folder: Folder, bad: BadPictures) -> None:
    if lines := bad.lines():
        folder.write(LEFT_OUT, lines)
    else:
        folder.delete(LEFT_OUT)


def data_files(folder: Folder) -> list[str]:
    """Returns the entries of the folder whose names are those of data files."""
    return [name for name in folder.names() if DATA_FILE.fullmatch(name)]


def file_names(manifest: Manifest | None) -> list[str]:
    return [file["name"] for split in manifest.splits.values() for file in split["files"]] if manifest else []


def clear_unfinished(folder: Folder, parts: list[Part]) -> None:
    """Removes the leftovers of an interrupted prepare but for these parts: in PREPARING, and moved out of it.

    Raises UserError if PREPARING holds files that prepare does not write.
    """
    inside = folder.names(PREPARING)
    if strange := [n for n in inside if not UNFINISHED.fullmatch(n)]:
        raise UserError(
            f"{join_uri(folder.uri, PREPARING, strange[0])} is in the way: this program did not write it; remove it, "
            "or use another --out"
        )
    if MANIFEST in inside and not folder.exists(MANIFEST):  # interrupted while moving files
        known = {sha256 for name in {MANIFEST, REPLACED} & set(inside) for sha256 in checksums(folder, name)}
        made = {made.file["sha256"]: part.name for part in parts if (made := noted(folder, part)) and made.file}
        for name in data_files(folder):
            if (sha256 := sha256_of(folder, name)) in made:
                folder.move(name, f"{made[sha256]}.parquet")
            elif sha256 in known:
                folder.delete(name)
        inside = folder.names(PREPARING)
    if not parts:
        return folder.delete(PREPARING)
    wanted = {f"part-{part.key}.{kind}" for part in parts for kind in ("parquet", "facts", "json")}
    for name in inside:
        if name not in wanted:
            folder.delete(f"{PREPARING}/{name}")


def checksums(folder: Folder, name: str) -> set[str]:
    """Returns the SHA-256 of the files that a manifest in PREPARING names, empty if it is damaged."""
    try:
        splits = from_json(folder.read(f"{PREPARING}/{name}"))["splits"]
        return {file["sha256"] for split in splits.values() for file in split["files"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        return set()


def whole(uri: str, source: str) -> Manifest | None:
    """Returns the manifest of a complete data set prepared from a source of that name, else None."""
    folder = Folder(uri)
    if not folder.exists(MANIFEST):
        return None
    manifest = read_manifest(uri)
    return manifest if manifest.source == source and is_whole(folder, manifest) else None


def is_whole(folder: Folder, manifest: Manifest) -> bool:
    """Whether each file that the manifest names exists and has its checksum."""
    files = [file for split in manifest.splits.values() for file in split["files"]]
    existing = set(folder.names())
    return all(f["name"] in existing and sha256_of(folder, f["name"]) == f["sha256"] for f in files)
