# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["datasets==5.2.0", "pillow==13.0.0"]
# ///
"""Stores a folder of pictures as Parquet with Hugging Face `datasets`: a peer of prepare.py.

Prints the seconds after its imports as JSON. Runs in an environment of its own
(`uv run --script`), since the project itself does not need `datasets`.
"""

import argparse
import json
import os
import time
from pathlib import Path


def by_to_parquet(folder: str, out: Path) -> None:
    """What a script does: load_dataset, then Parquet with the bytes of the pictures, which to_parquet leaves out."""
    from datasets import load_dataset  # noqa: PLC0415 - its settings come first
    from datasets.table import embed_table_storage  # noqa: PLC0415

    for split, rows in load_dataset("imagefolder", data_dir=folder, cache_dir=str(out / "cache")).items():
        whole = rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100).with_format(None)
        whole.to_parquet(out / f"{split}.parquet")


def straight(folder: str, out: Path, num_processes: int) -> None:
    """Without an Arrow file in between: the builder writes Parquet with the bytes of the pictures."""
    from datasets import load_dataset_builder  # noqa: PLC0415

    builder = load_dataset_builder("imagefolder", data_dir=folder, cache_dir=str(out / "cache"))
    more = {"num_proc": num_processes} if num_processes > 1 else {}
    builder.download_and_prepare(str(out / "parquet"), file_format="parquet", **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True, help="folder of pictures, SPLIT/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, required=True, help="folder for the Parquet files and the cache")
    parser.add_argument("--straight", action="store_true", help="the builder writes Parquet")
    parser.add_argument("--processes", type=int, default=1, help="with --straight: processes that write")
    args = parser.parse_args()
    os.environ |= {"HF_HOME": str(args.out / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets  # noqa: F401, PLC0415 - so that its time does not count

    start = time.perf_counter()
    if args.straight:
        straight(args.path, args.out, args.processes)
    else:
        by_to_parquet(args.path, args.out)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
