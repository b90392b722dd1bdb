"""The data card in words: warnings for people, the lines that a job prints, and the kinds of the card's values."""

from typing import Any

from cifar_dist.data.manifest import SPLITS
from cifar_dist.data.sources.names import NOTE, STRAY
from cifar_dist.errors import printable

FEW = {"train": 20, "validation": 10, "test": 10}  # pictures of a class: with fewer, a warning
MOST_IMBALANCE = 10.0  # the largest class by the smallest; from here on, a warning
LEAST_COPIES = 0.01  # the share of a split that are copies within it; from here on, a warning
MOST_ALIKE = 0.2  # the share of a split with near duplicates; from here on, the hash itself is in doubt
DOUBT = "so many are copies of few scenes, or are too plain for the comparison; look at the examples"
HARMLESS = {STRAY, NOTE}
HARM = {
    ("validation", "train"): "validation accuracy will look better than it is",
    ("test", "train"): "test accuracy will look better than it is",
    ("test", "validation"): "the best checkpoint is chosen on pictures of the test",
}


def warnings(card: dict[str, Any]) -> list[str]:
    """Returns sentences about what may mislead training or evaluation, the gravest first."""
    found = [leak(entry, card) for entry in card["duplicates"]["across"] if entry["num_pictures"]]
    found += contradictions(card["duplicates"]["contradictory"])
    found += near(card) if card["near_duplicates"] else []
    for name, split in card["splits"].items():
        found += balance(name, split, card["class_names"])
        found += copies(name, split, card["duplicates"]["within"][name])
    if kinds := [kind for kind in card["left_out"]["kinds"] if kind["kind"] not in HARMLESS]:
        found.append(f"not stored: {counts(kinds)}")
    return [printable(sentence) for sentence in found]


def leak(entry: dict[str, Any], card: dict[str, Any]) -> str:
    """Says how many pictures a split shares with an earlier split."""
    late, early = entry["split"], entry["other"]
    total = card["splits"][late]["num_rows"]
    mine, other = (picture["path"] for picture in entry["examples"][0])
    remedy = " before the split is drawn" if late in card["drawn"] else ""
    return (
        f"{entry['num_pictures']:,} of {total:,} {late} pictures ({percent(entry['share'])}) are also in {early}, e.g. "
        f"{mine} = {other}: {harm(late, early)}; remove the copies from the source{remedy}"
    )


def harm(late: str, early: str) -> str:
    return HARM.get((late, early), f"{late} and {early} are not independent")


def contradictions(found: dict[str, Any]) -> list[str]:
    if not found["num_groups"]:
        return []
    (a, b), num = found["examples"][0], found["num_pictures"]
    return [
        f"{pictures(num)} with equal pixels {'has' if num == 1 else 'have'} several labels, e.g. {a['path']} "
        f"({a['class']}) = {b['path']} ({b['class']}): no model can be right about both; correct the labels"
    ]


def balance(name: str, split: dict[str, Any], class_names: list[str]) -> list[str]:
    """Warns of classes with no, few or far fewer pictures than others."""
    found = []
    counts = list(zip(class_names, split["num_rows_per_class"], strict=True))
    if empty := split["empty_classes"]:
        harm = "the model cannot learn them" if name == "train" else f"{name} accuracy says nothing about them"
        found.append(f"{classes(len(empty), len(counts))} no {name} pictures, e.g. {empty[0]!r}: {harm}")
    if few := [(count, class_name) for class_name, count in counts if 0 < count < FEW[name]]:
        count, class_name = min(few)
        harm = "too few to learn from" if name == "train" else "too few to measure the accuracy per class"
        found.append(
            f"{classes(len(few), len(counts))} fewer than {FEW[name]} {name} pictures, e.g. {class_name!r} ({count}): "
            f"{harm}"
        )
    if split["imbalance"] >= MOST_IMBALANCE and name != "validation":
        largest = max(counts, key=lambda pair: pair[1])
        smallest = min((pair for pair in counts if pair[1]), key=lambda pair: pair[1])
        found.append(
            f"class {largest[0]!r} has {largest[1]:,} {name} pictures, class {smallest[0]!r} has {smallest[1]:,}: look "
            "at the accuracy per class, not only at the mean"
        )
    return found


def copies(name: str, split: dict[str, Any], within: dict[str, Any]) -> list[str]:
    """Warns if many pictures of a split are copies of other pictures of that split."""
    num_more = within["num_pictures"] - within["num_groups"]
    if num_more < max(1, LEAST_COPIES * split["num_rows"]):
        return []
    a, b = (picture["path"] for picture in within["examples"][0])
    return [
        f"{num_more:,} of {split['num_rows']:,} {name} pictures ({percent(num_more / split['num_rows'])}) repeat "
        f"another {name} picture, e.g. {b} = {a}: repeated pictures weigh more than others"
    ]


def near(card: dict[str, Any]) -> list[str]:
    """Warns of pictures that look like pictures of another split, or that the hash cannot tell apart."""
    found, sentences = card["near_duplicates"], []
    for entry in found["across"]:
        if entry["num_pictures"]:
            late, early = entry["split"], entry["other"]
            meaning = harm(late, early) if entry["share"] < MOST_ALIKE else DOUBT
            sentences.append(similar(card, entry, late, f"a picture of {early}", meaning))
    for name, entry in found["within"].items():
        if entry["share"] >= MOST_ALIKE:
            sentences.append(similar(card, entry, name, f"another {name} picture", DOUBT))
    return sentences


def similar(card: dict[str, Any], entry: dict[str, Any], split: str, like: str, meaning: str) -> str:
    mine, other = (picture["path"] for picture in entry["examples"][0]["pictures"])
    return (
        f"{entry['num_pictures']:,} of {card['splits'][split]['num_rows']:,} {split} pictures "
        f"({percent(entry['share'])}) look almost like {like}, e.g. {mine} and {other}: {meaning}"
    )


def told(card: dict[str, Any]) -> list[str]:
    """Returns the lines about the card that a job prints, warnings last. No line has control characters."""
    lines = [split_line(name, card["splits"][name]) for name in SPLITS if name in card["splits"]]
    lines += [duplicates_line(card)]
    if kinds := card["left_out"]["kinds"]:
        lines += [f"left out: {counts(kinds)}"]
    lines += [f"WARNING: {sentence}" for sentence in card["warnings"]]
    return [printable(line) for line in lines]


def split_line(name: str, split: dict[str, Any]) -> str:
    counts = split["num_rows_per_class"]
    per_class = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    width, height = (extent(split[side]) for side in ("width", "height"))
    formats = ", ".join(f"{count:,} {encoding}" for encoding, count in split["formats"].items())
    return (
        f"{name}: {pictures(split['num_rows'])}, {per_class} a class, {width} x {height} pixels, {formats}, "
        f"{size_of(split['num_bytes'])}"
    )


def duplicates_line(card: dict[str, Any]) -> str:
    """Says how many pictures repeat others, and what was compared."""
    exact, close = card["duplicates"], card["near_duplicates"]
    total = sum(split["num_rows"] for split in card["splits"].values())
    if not exact["num_compared"] and not close:
        return "duplicates: not looked for"
    line = f"duplicates: {exact['num_pictures']:,} pictures have the same pixels as another one"
    if exact["num_compared"] < total:
        line += f" ({exact['num_compared']:,} of {total:,} were compared)"
    if close:
        num_pairs = sum(part["num_pairs"] for part in [*close["within"].values(), *close["across"]])
        line += f"; {num_pairs:,} pairs look almost the same"
        line += f", {close['num_plain']:,} pictures are too plain to tell" if close["num_plain"] else ""
        line += ", not all pairs were compared" if close["num_bounded"] else ""
    return line


def size_of(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:,.1f} kB"


def counts(kinds: list[dict[str, Any]]) -> str:
    return ", ".join(f"{kind['num_files']:,} {kind['kind']}" for kind in kinds)


def extent(size: dict[str, float]) -> str:
    low, high = size["min"], size["max"]
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def pictures(count: int) -> str:
    return f"{count:,} picture" + "s" * (count != 1)


def were(count: int) -> str:
    return "was" if count == 1 else "were"


def classes(count: int, total: int) -> str:
    return f"{count:,} of {total:,} classes " + ("has" if count == 1 else "have")


def percent(share: float) -> str:
    """Returns a share as a percentage with one decimal, such as 1.9 %."""
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
