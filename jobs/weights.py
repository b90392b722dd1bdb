"""Fetches the published ImageNet weights of ResNet50V2 (94.7 MB, Keras's own file), or takes a file that is there."""

from cifar_dist.stopping import listen

listen(__name__ == "__main__")  # before the imports below, which take seconds

import os
import re
import sys
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

import pooch
import requests

from cifar_dist import models
from cifar_dist.config import Parser
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.models.keras_weights import PUBLISHED_MD5, PUBLISHED_NAME, PUBLISHED_URL, load_keras_weights
from cifar_dist.storage import Folder, file_sha256
from cifar_dist.uris import join_uri, output_uri

EXAMPLES = f"""examples:
  python jobs/weights.py --out /data/weights
  python jobs/weights.py --out s3://bucket/weights --path ~/Downloads/{PUBLISHED_NAME}
  python jobs/train.py --recipe deck_resnet50v2 --weights /data/weights/{PUBLISHED_NAME} ...
"""
RETRIES = 3  # after waits of 1, 2, 3 s, as pooch does


def parser() -> Parser:
    p = Parser(prog="weights.py", description=__doc__, epilog=EXAMPLES)
    p.add_argument("--out", required=True, metavar="URI", help="folder to put the file into")
    p.add_argument("--path", help="take this file instead of downloading")
    p.add_argument("--url", default=PUBLISHED_URL, help="where to download from, for a mirror (default: Google's)")
    p.add_argument("--md5", default=PUBLISHED_MD5, help="the file's checksum (default: that of the published file)")
    return p


def download(url: str, md5: str, folder: str) -> Path:
    """Downloads with retries and a progress bar. Raises UserError without a network, or for another checksum."""
    fetcher = pooch.create(
        folder,
        base_url="",
        registry={PUBLISHED_NAME: f"md5:{md5}"},
        urls={PUBLISHED_NAME: url},
        retry_if_failed=RETRIES,
    )
    pooch.get_logger().setLevel("WARNING")
    shown = re.sub("//[^/]*@", "//***@", url)  # no password is printed
    try:
        return Path(fetcher.fetch(PUBLISHED_NAME, downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty())))
    except requests.RequestException as error:
        raise UserError(
            f"cannot download {shown} ({type(error).__name__}); where there is no network, fetch the file elsewhere "
            "and name it with --path"
        ) from error
    except ValueError as error:
        raise UserError(f"{shown} is not the expected file: its md5 is not {md5}; name a mirror with --url") from error


def weights(url: str, path: str | None, md5: str, out: str) -> str:
    """Puts the file into `out`, checked by its md5 and against the network; returns its URI."""
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


if __name__ == "__main__":
    options = parser().parse_args()
    run = lambda: weights(options.url, options.path, options.md5, options.out)  # noqa: E731
    sys.exit(exit_code_of(run, options.debug))
