"""Finds out how the pictures at a path are laid out."""

from cifar_dist.data.sources.archives import TarTree, open_tree
from cifar_dist.data.sources.folders import folder_source
from cifar_dist.data.sources.label_files import FOUND_BY_ITSELF, labelled_source
from cifar_dist.data.sources.names import LeftOut, kind_of, split_in, split_of_folder
from cifar_dist.data.sources.pictures import outside_of, single_folder, unwrapped
from cifar_dist.data.sources.source import Source, with_test_split
from cifar_dist.data.sources.tables import is_table, table_source
from cifar_dist.data.sources.trees import Files, Tree
from cifar_dist.data.sources.webdataset import is_shard, shard_source, shards_of
from cifar_dist.errors import UserError


def find_source(
    name: str,
    path: str | None,
    *,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Source:
    """Returns the source at a path: `name` folder reads any layout, parquet tables only. Draws a missing test split.

    Raises UserError for a layout that is not understood."""
    if not path:
        raise UserError(f"--source {name} needs --path: a folder, an archive or a URI")
    tree = open_tree(path)
    files = tree.files()
    columns = {"image_column": image_column, "label_column": label_column}
    if labels and name == "parquet":
        raise UserError("--labels is for --source folder: a table of pictures has a column of labels")
    if labels:
        source = labelled_source(tree, files, {labels: ""}, **columns)
    elif shards := shards_at(tree, files, path) if name == "folder" else []:
        if image_column:
            raise UserError(f"--image-column has no effect on the webdataset shards in {path}; leave it out")
        source = shard_source(shards, path, label_column)
    elif name == "parquet" or (not any(kind_of(n) == "" for n in files.names) and any(map(is_table, files.names))):
        source = table_source(tree, files, path, **columns)
    else:
        source = picture_source(tree, files, path, columns)
    source.name = name
    return with_test_split(source, test_fraction, seed)


def shards_at(tree: Tree, files: Files, path: str) -> list[tuple[str, TarTree]]:
    """Returns the webdataset shards at a path by name, empty if it holds other data."""
    if isinstance(tree, TarTree) and is_shard(files):
        return [(path.rpartition("/")[2], tree)]
    return shards_of(tree, files)


def picture_source(tree: Tree, files: Files, path: str, columns: dict[str, str | None]) -> Source:
    """Returns the source of pictures in class folders, or with tables of labels beside them. Raises UserError."""
    around, tables, prefix = tree, dict[str, str](), ""
    inner, outside = files, list[LeftOut]()
    while not (tables := tables_by_themselves(inner)) and (top := single_folder(inner)):
        outside += outside_of(around, inner, top, prefix)
        around, inner, prefix = around.below(f"{top}/"), inner.below(f"{top}/"), f"{prefix}{top}/"
    if tables:
        source = labelled_source(around, inner, tables, **columns)
        source.notes += [f"{top}/ is left out: no table of labels names its pictures" for top in without(inner, tables)]
    else:
        if any(columns.values()):
            raise UserError(f"--image-column and --label-column are for tables; folders name their classes in {path}")
        around, inner, prefix, outside = unwrapped(tree, files)
        source = class_folders(around, inner, f"{path.rstrip('/')}/{prefix}".rstrip("/"), files)
    source.left_out.extend(outside)
    source.layout += f", all in {prefix}" if prefix else ""
    return source


def class_folders(tree: Tree, files: Files, where: str, every: Files) -> Source:
    """Returns the source of class folders. Raises UserError, too, if the data may lie in tables beside them."""
    tables = [name for name in every.names if is_table(name)]
    try:
        source = folder_source(tree, files, where)
    except UserError as error:
        if tables:
            raise UserError(f"{error}; to read the tables, such as {tables[0]}, use --source parquet") from error
        raise
    if both := [name for name in tables if is_of_a_layout(name, every)]:
        raise UserError(
            f"{where} holds pictures in folders, and tables such as {both[0]} lie beside them; name --source parquet "
            "for the tables, or the folder of the pictures with --path"
        )
    return source


def is_of_a_layout(table: str, files: Files) -> bool:
    """Whether a table seems to hold pictures of a split. One in a class folder belongs to the pictures there."""
    folder, _, base = table.rpartition("/")
    is_beside = any(name.rpartition("/")[0] == folder and kind_of(name) == "" for name in files.names)
    return bool(split_in(base)) or table.startswith("data/") or (bool(split_in(table)) and not is_beside)


def without(files: Files, tables: dict[str, str]) -> list[str]:
    """Returns the folders of splits whose pictures have no table, where the tables lie in folders of splits."""
    tops = {name.partition("/")[0] for name in files.names if "/" in name and kind_of(name) == ""}
    return sorted(tops - {name.partition("/")[0] for name in tables}) if all(tables.values()) else []


def tables_by_themselves(files: Files) -> dict[str, str]:
    """Returns tables of labels, with their splits, that lie beside pictures which no class folders hold.

    The library `datasets` reads such a metadata.csv in the folder itself, or one in each folder of a split."""
    tables: dict[str, str] = {}  # by the folder that holds them
    for name in files.names:
        folder, _, base = name.rpartition("/")
        if (
            base in FOUND_BY_ITSELF
            and (not folder or split_of_folder(folder))
            and tables.setdefault(folder, name) != name
        ):
            return {}  # two of them
    inner: dict[str, set[str]] = {folder: set() for folder in tables}  # folders of pictures below it
    for name in files.names:
        if kind_of(name) == "":
            top = name.partition("/")[0]
            folder = top if top in tables else ""
            if folder not in tables:
                if split_of_folder(top) in {"validation", "test"} and "train" in map(split_of_folder, tables):
                    inner.setdefault(top, set()).add(name.rpartition("/")[0])  # a split without labels
                    continue
                return {}
            inner[folder].add(name.rpartition("/")[0])
    if any(len(found) > 1 for found in inner.values()):
        return {}
    return {name: split_of_folder(folder) or "" for folder, name in tables.items()}
