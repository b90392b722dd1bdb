"""Fetches the published ImageNet weights of ResNet50V2 (94.7 MB, Keras's own file), or takes a file that is there."""

import os
import re
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cifar_dist.command_line import Command, Given
from cifar_dist.errors import UserError
from cifar_dist.models.published import PUBLISHED_MD5, PUBLISHED_NAME, PUBLISHED_URL
from cifar_dist.options import Section, option
from cifar_dist.uris import join_uri, output_uri

RETRIES = 3  # after waits of 1, 2, 3 s, as pooch does


@dataclass(frozen=True, kw_only=True)
class Weights(Section):
    table, heading = "weights", "weights"

    out: str = option(help="folder to put the file into", metavar="URI", common=True)
    path: str | None = option(None, help="take this file instead of downloading", metavar="FILE", common=True)
    url: str = option(PUBLISHED_URL, help="where to download from, for a mirror", metavar="URL")
    md5: str = option(PUBLISHED_MD5, help="checksum of the file", metavar="HEX")


COMMAND = Command(
    description=str(__doc__),
    sections=(Weights,),
    examples=f"""examples:
  python jobs/weights.py --out /data/weights
  python jobs/weights.py --out s3://bucket/weights --path ~/Downloads/{PUBLISHED_NAME}
  python jobs/train.py --recipe deck_resnet50v2 --weights /data/weights/{PUBLISHED_NAME} ...
""",
)


def run(given: Given) -> None:
    settings = given.build(Weights)
    store_weights(settings.url, settings.path, settings.md5, settings.out)


def download(url: str, md5: str, folder: str) -> Path:
    """Downloads the file with retries and a progress bar. Raises UserError without a network or for a wrong MD5."""
    import pooch  # noqa: PLC0415 - slow import, not needed for help
    import requests  # noqa: PLC0415

    fetcher = pooch.create(
        folder,
        base_url="",
        registry={PUBLISHED_NAME: f"md5:{md5}"},
        urls={PUBLISHED_NAME: url},
        retry_if_failed=RETRIES,
    )
    pooch.get_logger().setLevel("WARNING")
    shown = re.sub("//[^/]*@", "//***@", url)  # hides a password
    try:
        return Path(fetcher.fetch(PUBLISHED_NAME, downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty())))
    except requests.RequestException as error:
        raise UserError(
            f"cannot download {shown} ({type(error).__name__}); where there is no network, fetch the file elsewhere "
            "and name it with --path"
        ) from error
    except ValueError as error:
        raise UserError(f"{shown} is not the expected file: its md5 is not {md5}; name a mirror with --url") from error


def store_weights(url: str, path: str | None, md5: str, out: str) -> str:
    """Puts the file into `out` after checking its MD5 and that it fits the network. Returns the file's URI."""
    import pooch  # noqa: PLC0415 - slow import, not needed for help

    from cifar_dist import models  # noqa: PLC0415
    from cifar_dist.models.keras_weights import load_keras_weights  # noqa: PLC0415
    from cifar_dist.storage import Folder, file_sha256  # noqa: PLC0415

    target = join_uri(output_uri(out, "--out"), PUBLISHED_NAME)
    with TemporaryDirectory() as folder:
        source = Path(os.path.expanduser(path)) if path else download(url, md5, folder)
        if not source.is_file():
            raise UserError(f"--path {path} is not a file")
        if (found := pooch.file_hash(str(source), "md5")) != md5:
            raise UserError(f"{source} is not the expected file: its md5 is {found}, not {md5}")
        num_tensors = load_keras_weights(models.build("resnet50v2"), source)
        store = Folder(out)
        if store.exists(PUBLISHED_NAME):
            if store.download(PUBLISHED_NAME, Path(folder) / "there") != file_sha256(source):
                raise UserError(f"{target} is there already and is another file; remove it, or use another --out")
        else:
            store.create()
            part = f"{PUBLISHED_NAME}.{uuid.uuid4().hex[:8]}.tmp"
            store.upload(source, part)
            store.move(part, PUBLISHED_NAME)
        print(f"{target}: {num_tensors} tensors for resnet50v2, sha256 {file_sha256(source)}")
    return target
