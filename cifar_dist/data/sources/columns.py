"""Which columns of a table hold the pictures and the labels, by name and type."""

from typing import Any, NamedTuple

import pyarrow as pa

from cifar_dist.errors import UserError
from cifar_dist.options import nearest
from cifar_dist.sealed_json import from_json, is_texts

IMAGE_NAMES = ("image", "img", "picture", "photo", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "class", "class_name", "target", "category", "fine_label", "cls", "coarse_label")
ROW_NAMES = {"id", "idx", "index", "__index_level_0__", "uid", "uuid", "guid", "row", "row_id", "image_id", "number"}


class Columns(NamedTuple):
    """The columns to read. names: class names if the labels are their numbers. others: columns like the label's."""

    image: str
    label: str
    names: list[str] | None
    others: list[str]


def columns_of(
    where: str, schema: pa.Schema, image_column: str | None, label_column: str | None, *, needs_label: bool = True
) -> Columns:
    """Chooses the columns of a table, '' for a label that is not needed. Raises UserError if no choice is clear."""
    features = features_of(where, schema)
    shown = ", ".join(f"{field.name} ({short(field.type)})" for field in schema)
    if not needs_label and label_column not in schema.names:
        label_column = None
    for option, name in (("--image-column", image_column), ("--label-column", label_column)):
        if name and name not in schema.names:
            raise UserError(f"{where} has no column {name}{nearest(name, schema.names)}; {option} is one of: {shown}")
    images = [field.name for field in schema if is_picture(field.type)]
    labels = [field.name for field in schema if is_label(field.type) or is_empty_label(field, label_column)]
    if image_column and image_column not in images:
        raise UserError(f"{where}: column {image_column} holds no pictures; those are binary, or a struct with bytes")
    if label_column and label_column not in labels:
        raise UserError(f"{where}: column {label_column} holds no labels; those are numbers, texts or booleans")
    typed = {kind: [n for n, f in features.items() if f.get("_type") == kind] for kind in ("Image", "ClassLabel")}
    image = image_column or choice(images, IMAGE_NAMES, typed["Image"])
    if not image:
        raise UserError(f"{where} has the columns {shown}; which holds the pictures? Name it with --image-column")
    label = label_column or label_of(where, schema, [name for name in labels if name != image], typed["ClassLabel"])
    if not label:
        if not needs_label:
            return Columns(image, "", None, [])
        raise UserError(f"{where} has the columns {shown}; which holds the labels? Name it with --label-column")
    names = features.get(label, {}).get("names")
    if names is not None and not (is_texts(names) and names and len(set(names)) == len(names)):
        raise UserError(f"{where} has Hugging Face metadata whose class names are no list of names; write it again")
    others = [n for n in labels if n != label and (n in LABEL_NAMES or n in typed["ClassLabel"])]
    return Columns(image, label, names if pa.types.is_integer(schema.field(label).type) else None, others)


def label_of(where: str, schema: pa.Schema, labels: list[str], typed: list[str]) -> str | None:
    """Returns the column of labels among those that hold some, if the choice is clear. Raises UserError for lists."""
    fitting = [name for name in labels if name.lower() not in ROW_NAMES]
    lists = [field.name for field in schema if field.name in LABEL_NAMES and is_list(field.type)]
    if lists and not {*LABEL_NAMES, *typed} & {*fitting}:
        raise UserError(
            f"{where}: column {lists[0]} holds lists; a classifier needs one label a picture; name a column of such "
            "labels with --label-column"
        )
    return choice(fitting, LABEL_NAMES, typed)


def choice(fitting: list[str], usual: tuple[str, ...], typed: list[str]) -> str | None:
    """Returns the column with the most usual name, else the only one declared to be of the kind, else the only one."""
    by_name = [name for name in usual if name in fitting]
    typed = [name for name in typed if name in fitting]
    for names in (by_name[:1], typed, fitting):
        if len(names) == 1:
            return names[0]
    return None


def features_of(where: str, schema: pa.Schema) -> dict[str, Any]:
    """Returns the columns' features from the Hugging Face metadata, empty without metadata."""
    try:
        info = from_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        return {name: feature if isinstance(feature, dict) else {} for name, feature in features.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where} has Hugging Face metadata that cannot be read ({error}); write it again") from error


def is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and is_binary(kind.field(at).type)
    return is_binary(kind)


def is_label(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        test(kind)
        for test in (
            pa.types.is_integer,
            pa.types.is_floating,
            pa.types.is_boolean,
            pa.types.is_string,
            pa.types.is_large_string,
        )
    )


def is_empty_label(field: pa.Field, label_column: str | None) -> bool:
    """Whether a column whose values are all missing is that of the labels."""
    return pa.types.is_null(field.type) and field.name in (label_column, *LABEL_NAMES)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def short(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else str(kind)
