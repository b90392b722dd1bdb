"""Finds out how the pictures at a path are laid out."""

from cifar_dist.data.sources.archives import TarTree, open_tree
from cifar_dist.data.sources.folders import folder_source
from cifar_dist.data.sources.label_files import FOUND_BY_ITSELF, labelled_source
from cifar_dist.data.sources.names import kind_of, split_of_folder
from cifar_dist.data.sources.pictures import unwrapped
from cifar_dist.data.sources.source import Source, with_test_split
from cifar_dist.data.sources.tables import is_table, table_source
from cifar_dist.data.sources.trees import Files
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
    elif shards := shards_of(tree, files) if name == "folder" else []:
        source = shard_source(shards, path, label_column)
    elif isinstance(tree, TarTree) and name == "folder" and is_shard(files):
        source = shard_source([(path.rpartition("/")[2], tree)], path, label_column)
    elif name == "parquet" or (not any(kind_of(n) == "" for n in files.names) and any(map(is_table, files.names))):
        source = table_source(tree, files, path, **columns)
    else:
        if label_column or image_column:
            raise UserError("--image-column and --label-column are for tables; folders name their classes")
        if tables := tables_by_themselves(files):
            source = labelled_source(tree, files, tables)
        else:
            tree, files, prefix, outside = unwrapped(tree, files)
            source = folder_source(tree, files, f"{path.rstrip('/')}/{prefix}".rstrip("/"))
            source.left_out.extend(outside)
    source.name = name
    return with_test_split(source, test_fraction, seed)


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
                return {}
            inner[folder].add(name.rpartition("/")[0])
    if any(len(found) > 1 for found in inner.values()):
        return {}
    return {name: split_of_folder(folder) or "" for folder, name in tables.items()}
