"""The data card: known answers for small hand-made tables, pictures held twice, warnings, damaged and forged files."""

import copy
import hashlib
import struct
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cifar_dist.data import near_duplicates as near
from cifar_dist.data.card import CARD, FACTS, data_card, read_card, write_card
from cifar_dist.data.card_words import DOUBT, FEW, told
from cifar_dist.data.check import pixels_sha256
from cifar_dist.data.manifest import FORMAT_VERSION, Manifest
from cifar_dist.data.near_duplicates import perceptual_hash
from cifar_dist.data.sources.names import NOTE, STRAY
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, seal, to_json
from cifar_dist.storage import Folder

NAMES = ["cat", "dog"]
MANIFEST_SHA256 = "ab" * 32
PATTERN = 0x5A3C_96E1_2D4B_C387  # a hash with many changes


def fact(path, label=0, pixels=None, code=None, **other):
    """A row of FACTS. pixels: a number that stands for the content; code: the perceptual hash."""
    sha256 = None if pixels is None else hashlib.sha256(str(pixels).encode()).digest()
    row = {"path": path, "label": label, "height": 32, "width": 32, "num_bytes": 100, "encoding": "JPEG"}
    row |= {"pixels_sha256": sha256, "perceptual_hash": code, "stored_as_png": False, "has_alpha": False}
    return row | other


def card_of(left_out=(), class_names=NAMES, drawn=(), **splits):
    tables = {name: pa.Table.from_pylist(rows, schema=FACTS) for name, rows in splits.items()}
    facts = {"source": "hand", "manifest_sha256": MANIFEST_SHA256, "class_names": class_names}
    return data_card(**facts, splits=tables, left_out=list(left_out), layout="folders", drawn=drawn)


def paths(examples):
    return [tuple(picture["path"] for picture in example) for example in examples]


def many(split, num_rows, start=0):
    """Rows of two classes with different pixels, enough for no warning."""
    return [fact(f"{split}/{i}", i % 2, start + i) for i in range(num_rows)]


@pytest.fixture
def card():
    """40 train and 20 test pictures, of which train/0, train/3 and test/0 have equal pixels."""
    train, test = many("train", 40), many("test", 20, 1000)
    train[3]["pixels_sha256"] = test[0]["pixels_sha256"] = train[0]["pixels_sha256"]
    return card_of(train=train, test=test, left_out=[{"kind": "unreadable", "path": "x", "reason": "it is empty"}])


# Counts and sizes.


def test_a_split_is_described():
    rows = [
        fact("a", 0, width=30, height=20, num_bytes=10),
        fact("b", 0, width=10, height=20, num_bytes=20, encoding="GIF", stored_as_png=True, has_alpha=True),
        fact("c", 0, width=30, height=20, num_bytes=40, stored_as_png=True),
        fact("d", 1, width=20, height=40, num_bytes=80),
    ]
    split = card_of(train=rows, class_names=["cat", "dog", "eel"])["splits"]["train"]
    assert (split["num_rows"], split["num_rows_per_class"], split["imbalance"]) == (4, [3, 1, 0], 3.0)
    assert (split["share_per_class"], split["empty_classes"]) == ([0.75, 0.25, 0.0], ["eel"])
    assert split["width"] == {"min": 10.0, "median": 25.0, "max": 30.0}
    assert split["height"] == {"min": 20.0, "median": 20.0, "max": 40.0}
    assert split["aspect_ratio"] == {"min": 0.5, "median": 1.0, "max": 1.5}
    assert split["num_sizes"] == 3
    assert split["common_sizes"] == [
        {"width": 30, "height": 20, "num_pictures": 2},
        {"width": 10, "height": 20, "num_pictures": 1},
        {"width": 20, "height": 40, "num_pictures": 1},
    ]
    assert (split["num_bytes"], split["formats"]) == (150, {"GIF": 1, "JPEG": 3})
    assert (split["num_stored_as_png"], split["num_with_transparency"]) == (2, 1)


def test_a_table_with_other_columns_is_refused():
    table = pa.Table.from_pylist([fact("a")], schema=FACTS).drop_columns("has_alpha")
    with pytest.raises(ValueError, match="the facts of train have another schema"):
        data_card(source="", manifest_sha256="", class_names=NAMES, splits={"train": table}, left_out=[])


def test_what_was_left_out_is_counted_by_kind():
    left_out = [{"kind": "tiny", "path": f"t{i}"} for i in range(12)]
    left_out[3:3] = [{"kind": "unreadable", "path": "u", "reason": "it is empty"}]
    found = card_of(left_out, train=many("train", 2))["left_out"]
    assert found["num_files"] == 13
    assert [(kind["kind"], kind["num_files"]) for kind in found["kinds"]] == [("tiny", 12), ("unreadable", 1)]
    assert [example["path"] for example in found["kinds"][0]["examples"]] == [f"t{i}" for i in range(10)]
    assert found["kinds"][1]["examples"] == [{"path": "u", "reason": "it is empty"}]


# Pictures with equal pixels.


def test_the_checksum_is_of_the_size_and_the_pixels():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    expected = hashlib.sha256(struct.pack("<II", 2, 3) + pixels.tobytes()).digest()
    assert pixels_sha256(pixels) == expected
    assert pixels_sha256(np.asfortranarray(pixels)) == expected
    assert pixels_sha256(pixels.reshape(3, 2, 3)) != expected


def test_copies_are_counted_within_and_across_splits_and_labels():
    train = [fact("a", 0, 1), fact("b", 0, 2), fact("c", 0, 1), fact("d", 1, 3), fact("e", 0, 1), fact("f", 0, 2)]
    validation = [fact("g", 0, 9), fact("h", 1, 8)]
    test = [fact("i", 1, 2), fact("j", 0, 7), fact("k", 1, 8), fact("l", 0, 2), fact("m", 0, None), fact("n", 0, None)]
    found = card_of(train=train, validation=validation, test=test)["duplicates"]
    assert (found["num_compared"], found["num_pictures"]) == (12, 9)
    within = {name: (w["num_groups"], w["num_pictures"], paths(w["examples"])) for name, w in found["within"].items()}
    assert within == {"train": (2, 5, [("a", "c"), ("b", "f")]), "validation": (0, 0, []), "test": (1, 2, [("i", "l")])}
    across = {(e["split"], e["other"]): e for e in found["across"]}
    assert list(across) == [("validation", "train"), ("test", "train"), ("test", "validation")]
    counts = {pair: (e["num_groups"], e["num_pictures"], e["share"]) for pair, e in across.items()}
    assert list(counts.values()) == [(0, 0, 0.0), (1, 2, 2 / 6), (1, 1, 1 / 6)]
    assert paths(across["test", "train"]["examples"]) == [("i", "b")]
    assert across["test", "validation"]["examples"] == [
        [{"path": "k", "split": "test", "class": "dog"}, {"path": "h", "split": "validation", "class": "dog"}]
    ]
    other = found["contradictory"]
    assert (other["num_groups"], other["num_pictures"], paths(other["examples"])) == (1, 4, [("b", "i")])


def test_of_many_copies_the_first_ten_are_named():
    train = [fact(f"train/{i}", 0, i) for i in range(30)]
    test = [fact(f"test/{i}", 1, 29 - i) for i in range(30)]
    found = card_of(train=train, test=test)["duplicates"]
    expected = [(f"train/{i}", f"test/{29 - i}") for i in range(10)]
    assert paths(found["contradictory"]["examples"]) == expected
    assert paths(found["across"][0]["examples"]) == [(late, early) for early, late in expected]
    assert found["across"][0]["share"] == 1.0


def test_rows_without_a_checksum_are_no_copies():
    card = card_of(train=[fact(str(i)) for i in range(50)])
    assert card["duplicates"]["num_compared"] == card["duplicates"]["num_pictures"] == 0
    assert card["near_duplicates"] is None
    assert "duplicates: not looked for" in told(card)


# Pictures that look alike.


def natural(size, seed=0):
    """uint8 [size, size, 3]: smooth random blobs."""
    rough = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((size, size), Image.Resampling.BICUBIC))


def distance(a, b):
    return (a ^ b).bit_count()


def test_the_hash_compares_neighbouring_cells():
    cells = np.random.default_rng(3).integers(0, 255, (8, 9), dtype=np.uint8)
    bits = "".join(str(int(cells[y, x + 1] > cells[y, x])) for y in range(8) for x in range(8))
    pixels = np.repeat(np.repeat(np.repeat(cells[..., None], 3, 2), 4, 0), 4, 1)
    assert perceptual_hash(pixels) == int(bits, 2)
    assert perceptual_hash(np.full((5, 7, 3), 200, np.uint8)) == 0
    assert perceptual_hash(np.zeros((1, 1, 3), np.uint8)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_hash_survives_a_change_of_size_and_tells_pictures_apart(seed):
    code = perceptual_hash(natural(1200, seed))
    small = np.asarray(Image.fromarray(natural(1200, seed)).resize((90, 90), Image.Resampling.BICUBIC))
    assert distance(code, perceptual_hash(small)) <= near.DISTANCE
    assert distance(code, perceptual_hash(natural(1200, seed + 100))) > 4 * near.DISTANCE


def flipped(code, *bits):
    for bit in bits:
        code ^= 1 << bit
    return code


def alike(**splits):
    return card_of(**splits)["near_duplicates"]


def test_pictures_with_close_hashes_are_pairs():
    bits = (0, 20, 30, 63)  # in four bands of five
    train = [fact("a", 0, 1, PATTERN), fact("b", 0, 2, flipped(PATTERN, *bits, 45))]
    test = [fact("c", 1, 3, flipped(PATTERN, *bits)), fact("d", 1, 4, None)]
    found = alike(train=train, test=test)
    assert (found["distance"], found["num_compared"], found["num_plain"], found["num_bounded"]) == (4, 3, 0, 0)
    (across,) = found["across"]
    assert (across["num_pairs"], across["num_pictures"], across["share"]) == (2, 1, 0.5)
    assert [(e["distance"], *paths([e["pictures"]])) for e in across["examples"]] == [(1, ("c", "b")), (4, ("c", "a"))]
    assert {name: w["num_pairs"] for name, w in found["within"].items()} == {"train": 0, "test": 0}  # a, b: 5 bits


def test_equal_pictures_are_no_near_duplicates_and_their_copies_count_once():
    train = [fact("a", 0, 1, PATTERN), fact("b", 0, 1, PATTERN), fact("c", 0, 2, flipped(PATTERN, 7))]
    test = [fact("d", 0, 1, PATTERN), fact("e", 0, 3, flipped(PATTERN, 9, 10)), fact("f", 0, None, PATTERN)]
    found = alike(train=train, test=test)
    assert paths(e["pictures"] for e in found["within"]["train"]["examples"]) == [("c", "a")]
    assert (found["within"]["train"]["num_pairs"], found["within"]["train"]["num_pictures"]) == (1, 2)
    pairs = paths(e["pictures"] for e in found["across"][0]["examples"])
    assert pairs == [("f", "a"), ("d", "c"), ("f", "c"), ("e", "a"), ("e", "c")]
    assert found["across"][0]["num_pictures"] == 3


def brute_force(codes, is_test):
    """{(split, split): pairs within DISTANCE} and {(split, split): rows of the second with a partner in the first}."""
    pairs, rows = {}, {}
    for b in range(len(codes)):
        for a in range(b):
            if distance(codes[a], codes[b]) <= near.DISTANCE:
                key = is_test[a], is_test[b]
                pairs[key] = pairs.get(key, 0) + 1
                rows.setdefault(key, set()).add(b)
                rows.setdefault(key[::-1], set()).add(a)
    return pairs, {key: len(found) for key, found in rows.items()}


def test_all_pairs_are_found_once():
    random = np.random.default_rng(5)
    codes = [flipped(PATTERN, *random.permutation(64)[: random.integers(5)].tolist()) for _ in range(300)]
    assert near.num_changes(np.array(codes, np.uint64)).min() >= near.LEAST_CHANGES
    facts = [fact(str(i), 0, i, code) for i, code in enumerate(codes)]
    found = alike(train=facts[:200], test=facts[200:])
    pairs, rows = brute_force(codes, [i >= 200 for i in range(300)])
    (across,) = found["across"]
    counted = {(0, 0): found["within"]["train"], (1, 1): found["within"]["test"], (0, 1): across}
    assert {key: part["num_pairs"] for key, part in counted.items()} == pairs
    assert {key: part["num_pictures"] for key, part in counted.items()} == {key: rows[key] for key in counted}
    for part in counted.values():
        nearest = [example["distance"] for example in part["examples"]]
        assert nearest == sorted(nearest)
        assert len(nearest) == 10


def test_examples_are_the_nearest_first_rows_wherever_they_stand():
    codes = [flipped(PATTERN, 1, 2, 3)] * 40 + [PATTERN] * 12
    found = alike(train=[fact(str(i), 0, i, code) for i, code in enumerate(codes)])["within"]["train"]
    expected = [(str(b), str(a)) for a in range(1) for b in range(1, 11)]
    assert paths(e["pictures"] for e in found["examples"]) == expected
    assert found["num_pairs"] == 52 * 51 // 2


def test_near_examples_replace_farther_ones_that_were_found_before():
    bases = np.random.default_rng(2).integers(0, 2**63, 24).tolist()  # far from each other
    codes = [(code, flipped(code, *bits)) for code, bits in zip(bases, [(20, 30, 40)] * 12 + [(0,)] * 12, strict=True)]
    facts = [fact(f"{i}{part}", 0, f"{i}{part}", pair[part]) for i, pair in enumerate(codes) for part in (0, 1)]
    found = alike(train=facts)["within"]["train"]
    assert (found["num_pairs"], [example["distance"] for example in found["examples"]]) == (24, [1] * 10)
    assert paths(e["pictures"] for e in found["examples"]) == [(f"{i}1", f"{i}0") for i in range(12, 22)]


@pytest.mark.parametrize("code", [0, 2**64 - 1, 0xF0F0F0F0F0F0F0F0, 0xFFFFFFFF])
def test_plain_pictures_are_not_compared(code):
    found = alike(train=[fact(str(i), 0, i, code) for i in range(100)])
    assert (found["num_compared"], found["num_plain"], found["within"]["train"]["num_pairs"]) == (0, 100, 0)


def test_changes_are_those_between_neighbouring_bits():
    grid = np.random.default_rng(1).integers(0, 2, (8, 8), dtype=np.uint8)
    code = int("".join(map(str, grid.ravel())), 2)
    expected = (grid[1:] != grid[:-1]).sum() + (grid[:, 1:] != grid[:, :-1]).sum()
    assert near.num_changes(np.array([code], np.uint64)).tolist() == [expected]


def test_a_giant_bucket_is_bounded_and_said_to_be(monkeypatch):
    monkeypatch.setattr(near, "MOST_COMPARED", 20)
    facts = [fact(f"{i}", i % 2, i, PATTERN) for i in range(100)]
    card = card_of(train=facts)
    found = card["near_duplicates"]
    assert (found["num_bounded"], found["within"]["train"]["num_pictures"]) == (100, 100)
    assert found["within"]["train"]["num_pairs"] == sum(100 - offset for offset in range(1, 21))
    assert any("not all pairs were compared" in line for line in told(card))


# Warnings.


def warnings_of(**options):
    return card_of(**options)["warnings"]


def test_a_sound_data_set_has_no_warnings():
    assert warnings_of(train=many("train", 40), test=many("test", 20, 1000)) == []


def test_leakage_is_said_with_numbers_and_an_example(card):
    assert card["warnings"][0] == (
        "1 of 20 test pictures (5.0 %) are also in train, e.g. test/0 = train/0: test accuracy will look better than "
        "it is; remove the copies from the source"
    )
    train, validation = many("train", 40), many("validation", 20)
    (sentence,) = warnings_of(train=train, validation=validation, drawn=["validation"])
    assert "20 of 20 validation pictures (100.0 %)" in sentence
    assert sentence.endswith("remove the copies from the source before the split is drawn")


def test_contradictory_labels_are_said():
    train = [*many("train", 40), fact("train/x", 1, 0)]
    assert warnings_of(train=train, test=many("test", 20, 1000))[0] == (
        "2 pictures with equal pixels have several labels, e.g. train/0 (cat) = train/x (dog): no model can be right "
        "about both; correct the labels"
    )


def test_copies_within_a_split_are_said_from_one_in_a_hundred_on():
    train, test = many("train", 200), many("test", 20, 1000)
    train[2]["pixels_sha256"] = train[0]["pixels_sha256"]
    assert warnings_of(train=train, test=test) == []
    train[4]["pixels_sha256"] = train[0]["pixels_sha256"]
    assert warnings_of(train=train, test=test) == [
        "2 of 200 train pictures (1.0 %) repeat another train picture, e.g. train/2 = train/0: repeated pictures weigh "
        "more than others"
    ]


def test_imbalance_and_missing_and_small_classes_are_said():
    counts = {"train": [300, 30, FEW["train"] - 1], "test": [40, 0, 20]}
    splits = {
        split: [fact(f"{split}/{label}/{i}", label) for label, count in enumerate(c) for i in range(count)]
        for split, c in counts.items()
    }
    assert warnings_of(class_names=["cat", "dog", "eel"], **splits) == [
        "1 of 3 classes has fewer than 20 train pictures, e.g. 'eel' (19): too few to learn from",
        "class 'cat' has 300 train pictures, class 'eel' has 19: look at the accuracy per class, not only at the mean",
        "1 of 3 classes has no test pictures, e.g. 'dog': test accuracy says nothing about them",
    ]


def test_near_duplicates_across_splits_are_said_and_doubted_if_many():
    train = [fact(f"train/{i}", i % 2, i, None if i else PATTERN) for i in range(40)]
    test = [fact(f"test/{i}", i % 2, 1000 + i, None if i else flipped(PATTERN, 5)) for i in range(20)]
    (sentence,) = warnings_of(train=train, test=test)
    assert sentence == (
        "1 of 20 test pictures (5.0 %) look almost like a picture of train, e.g. test/0 and train/0: test accuracy "
        "will look better than it is"
    )
    for row in (*train, *test):
        row["perceptual_hash"] = PATTERN
    sentences = warnings_of(train=train, test=test)
    assert [sentence.partition(" ")[0] for sentence in sentences] == ["20", "40", "20"]
    assert all(sentence.endswith(DOUBT) for sentence in sentences)


def test_the_job_prints_splits_duplicates_and_warnings(card):
    lines = told(card)
    assert lines[:3] == [
        "train: 40 pictures, 20 a class, 32 x 32 pixels, 40 JPEG, 4.0 kB",
        "test: 20 pictures, 10 a class, 32 x 32 pixels, 20 JPEG, 2.0 kB",
        "duplicates: 3 pictures have the same pixels as another one",
    ]
    assert lines[3] == "left out: 1 unreadable"
    assert lines[4:] == [f"WARNING: {sentence}" for sentence in card["warnings"]]
    assert lines[-1] == "WARNING: not stored: 1 unreadable"


def test_files_that_are_no_pictures_are_told_without_a_warning():
    stray = [{"kind": STRAY, "path": "Thumbs.db"}, {"kind": NOTE, "path": "README.txt"}]
    card = card_of(stray, train=many("train", 40), test=many("test", 20))
    assert not any("not stored" in sentence for sentence in card["warnings"])
    assert f"left out: 1 {NOTE}, 1 {STRAY}" in told(card) or f"left out: 1 {STRAY}, 1 {NOTE}" in told(card)


def test_hostile_paths_stay_on_one_line_without_control_characters():
    bad = "a\n\x1b[31m\r\u202eb.png"
    card = card_of(train=[fact(bad, 0, 1), fact(bad, 1, 1)], left_out=[{"kind": bad, "path": bad}])
    assert len(card["warnings"]) >= 3
    assert all(line.isprintable() for line in [*card["warnings"], *told(card)])


def test_a_thousand_classes_are_a_card():
    names = [f"class {i}" for i in range(1000)]
    facts = [fact(f"{i}", i % 999, i) for i in range(999 * FEW["train"])]
    card = card_of(train=facts, class_names=names)
    assert card["warnings"] == [
        "1 of 1,000 classes has no train pictures, e.g. 'class 999': the model cannot learn them"
    ]
    assert len(to_json(card)) < 100_000


# The file.


def manifest_of(card, **other):
    splits = {name: {"num_rows_per_class": split["num_rows_per_class"]} for name, split in card["splits"].items()}
    values = {"source": "hand", "class_names": card["class_names"], "splits": splits, "num_skipped": 0}
    return replace(Manifest(format_version=FORMAT_VERSION, sha256=MANIFEST_SHA256, **values), **other)


@pytest.fixture
def folder(tmp_path, card):
    folder = Folder(str(tmp_path))
    write_card(folder, card)
    return folder


def test_a_card_is_read_as_it_was_made(folder, card, tmp_path):
    assert read_card(folder.uri, manifest_of(card)) == card
    content = folder.read(CARD)
    write_card(folder, card)
    assert folder.read(CARD) == content
    near_card = card_of(train=[fact(str(i), 0, i, PATTERN) for i in range(30)], test=[fact("t", 1, 90, PATTERN)])
    write_card(folder, near_card)
    found = read_card(folder.uri, manifest_of(near_card))
    assert found == near_card
    assert [list(found["splits"]), list(found["near_duplicates"]["within"])] == [["train", "test"]] * 2  # as they were
    assert told(found) == told(near_card)
    (tmp_path / CARD).unlink()
    assert read_card(folder.uri, manifest_of(card)) is None


def test_a_card_of_another_data_set_is_refused(folder, card):
    others = {
        "sha256": {"sha256": "cd" * 32},
        "names": {"class_names": ["cat", "cow"]},
        "counts": {"splits": {**manifest_of(card).splits, "train": {"num_rows_per_class": [21, 19]}}},
    }
    for other in others.values():
        with pytest.raises(UserError, match=r"data_card\.json describes another data set .*; remove it, or prepare"):
            read_card(folder.uri, manifest_of(card, **other))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"format_version": NaN}', b"[" * 100_000])
def test_a_damaged_card_is_refused(folder, card, content):
    folder.write(CARD, content)
    with pytest.raises(UserError, match=r"data_card\.json is damaged .*; remove it, or prepare the data set again"):
        read_card(folder.uri, manifest_of(card))


def test_a_changed_card_and_another_version_are_refused(folder, card):
    content = folder.read(CARD)
    folder.write(CARD, content.replace(b"it is empty", b"it is EMPTY"))
    with pytest.raises(UserError, match="does not match its own checksum"):
        read_card(folder.uri, manifest_of(card))
    write_card(folder, {**card, "format_version": 2})
    with pytest.raises(UserError, match="has format version 2, this program reads 1"):
        read_card(folder.uri, manifest_of(card))


def every_place(value, place=()):
    """Yields the place of every value in nested dicts and lists."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from every_place(item, (*place, key))


def test_a_forged_card_is_refused_wherever_it_is_changed(folder, card):
    """Any value of another kind, in a card that was sealed again."""
    card = card_of(
        train=[fact("a", 0, 1, PATTERN), fact("b", 1, 1, PATTERN)],
        test=[fact("c", 0, 2, PATTERN), fact("d", 1, 1, PATTERN)],
        left_out=[{"kind": "tiny", "path": "t"}],
    )
    manifest, stored = manifest_of(card), from_json(to_json(card))
    places = [place for place in every_place(stored) if place and place[0] != "format_version"]
    assert len(places) > 150
    for place in places:
        for fault in ({"new": [None]}, -1):
            forged = copy.deepcopy(stored)
            inner = forged
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = fault
            folder.write(CARD, to_json(seal(forged)))
            with pytest.raises(UserError, match=r"data_card\.json (is damaged|describes another data set)"):
                read_card(folder.uri, manifest)
    for key in stored:
        folder.write(CARD, to_json(seal({k: v for k, v in stored.items() if k != key})))
        with pytest.raises(UserError, match=r"data_card\.json is damaged"):
            read_card(folder.uri, manifest)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda found: found["within"].update(more=found["within"].pop("test")), "is damaged"),
        (lambda found: found["within"].pop("test"), "describes another data set"),
        (lambda found: found["across"].clear(), "describes another data set"),
        (lambda found: found["across"][0].update(split="train"), "describes another data set"),
    ],
)
def test_a_card_that_compares_other_splits_is_refused(folder, card, fault, words):
    fault(card["duplicates"])
    write_card(folder, card)
    with pytest.raises(UserError, match=words):
        read_card(folder.uri, manifest_of(card))


def test_splits_come_in_the_order_of_use():
    test_first = card_of(test=many("test", 20, 1000), validation=many("v", 20, 500), train=many("train", 40))
    assert list(test_first["splits"]) == ["train", "validation", "test"]
    with pytest.raises(ValueError, match="the splits dev are none of train"):
        card_of(train=many("train", 2), dev=many("dev", 2))
