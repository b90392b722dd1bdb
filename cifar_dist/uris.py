"""URIs of files and folders: local paths, and URIs that pyarrow.fs opens."""

import os
import re
from typing import TYPE_CHECKING

from cifar_dist.errors import UserError

if TYPE_CHECKING:
    from pyarrow import fs

RAY_UPLOADS = "/runtime_resources/working_dir_files/"


def absolute_uri(uri: str) -> str:
    """Returns a URI unchanged, a local path made absolute: workers run in another directory. Raises UserError."""
    if not uri:
        raise UserError("an empty path or URI was given; name a folder, or a URI such as s3://bucket/folder")
    if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", uri) or re.fullmatch(r"[a-z][a-z0-9+.-]*:/*", uri):
        raise UserError(f"{uri} is no URI: write SCHEME://BUCKET/FOLDER, such as s3://bucket/folder")
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def output_uri(uri: str, option: str) -> str:
    """Returns absolute_uri for outputs. Raises UserError for a path in the folder where Ray unpacks a submitted job.

    Ray deletes that folder, and creates another one after any change of the code."""
    found = absolute_uri(uri)
    if "://" not in found and RAY_UPLOADS in os.path.realpath(found):
        raise UserError(
            f"{option} {uri} lies in the folder that Ray unpacks a submitted job into and deletes again; give an "
            f"absolute path or a URI, such as {option} /data/NAME or {option} s3://bucket/NAME"
        )
    return found


def lies_in(uri: str, folder: str) -> bool:
    """Whether `uri` is `folder` or lies in it, after following links."""
    from pyarrow import fs  # noqa: PLC0415 - slow import, not needed for help

    (fs_inner, inner), (fs_outer, outer) = open_uri(uri), open_uri(folder)
    if isinstance(fs_inner, fs.LocalFileSystem):
        inner = os.path.realpath(inner)
    if isinstance(fs_outer, fs.LocalFileSystem):
        outer = os.path.realpath(outer)
    same = type(fs_inner) is type(fs_outer)
    return same and f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def join_uri(uri: str, *parts: str) -> str:
    """Appends path parts before a query such as ?region=..."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *filter(None, parts)]) + mark + query


def split_uri(uri: str) -> tuple[str, str]:
    """Returns (folder, last part) of a path or URI. The folder keeps a query such as ?region=..."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    folder, _, name = base.rstrip("/").rpartition("/")
    return (folder or ("/" if base.startswith("/") else ".")) + mark + query, name


def open_uri(uri: str) -> tuple["fs.FileSystem", str]:
    """Returns the file system of a URI and the path in it. Raises UserError if the URI cannot be opened."""
    import pyarrow as pa  # noqa: PLC0415 - slow import, not needed for help
    from pyarrow import fs  # noqa: PLC0415

    uri = absolute_uri(uri)
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    if holds_credentials(uri):
        raise UserError(
            f"the URI {uri.split('://')[0]}://... holds credentials; leave them out and set them in the "
            "environment (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot open the URI {uri}: {str(error).splitlines()[0]}") from error


def holds_credentials(uri: str) -> bool:
    """Whether the URI contains a user, a password or a key. A secret key may contain slashes."""
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    host = place.split("/")[0]
    in_place = "@" in place and (":" in host or ("@" in host and not scheme.startswith(("abfs", "wasb"))))
    return in_place or re.search(r"(?i)(secret|password|token|access_key)[^=&]*=", query) is not None
