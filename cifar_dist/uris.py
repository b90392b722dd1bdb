"""URIs of files and folders: local paths, and whatever pyarrow.fs opens."""

import os
import re

import pyarrow as pa
from pyarrow import fs

from cifar_dist.errors import UserError

RAY_UPLOADS = "/runtime_resources/working_dir_files/"


def absolute_uri(uri: str) -> str:
    """The URI as it is, or a local path made absolute (workers run in another directory)."""
    if not uri:
        raise UserError("an empty path or URI was given; name a folder, or a URI such as s3://bucket/folder")
    if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", uri) or re.fullmatch(r"[a-z][a-z0-9+.-]*:/*", uri):
        raise UserError(f"{uri} is no URI: write SCHEME://BUCKET/FOLDER, such as s3://bucket/folder")
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def output_uri(uri: str, option: str) -> str:
    """absolute_uri, for what is written. Raises UserError for a path in the folder that Ray unpacks a submitted job
    into: Ray deletes it, and makes another one for any change of the code."""
    found = absolute_uri(uri)
    if "://" not in found and RAY_UPLOADS in os.path.realpath(found):
        raise UserError(
            f"{option} {uri} lies in the folder that Ray unpacks a submitted job into and deletes again; give an "
            f"absolute path or a URI, such as {option} /data/NAME or {option} s3://bucket/NAME"
        )
    return found


def lies_in(uri: str, folder: str) -> bool:
    """Whether a file or folder is another one or lies in it, links followed."""
    (fs_inner, inner), (fs_outer, outer) = open_uri(uri), open_uri(folder)
    if isinstance(fs_inner, fs.LocalFileSystem):
        inner = os.path.realpath(inner)
    if isinstance(fs_outer, fs.LocalFileSystem):
        outer = os.path.realpath(outer)
    same = type(fs_inner) is type(fs_outer)
    return same and f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def join_uri(uri: str, *parts: str) -> str:
    """Appends path parts, in front of a query such as ?region=..."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *filter(None, parts)]) + mark + query


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path inside it. Raises UserError for a URI that cannot be opened."""
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
    """Whether a user, a password or a key is in the URI; a secret key may have slashes in it."""
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    host = place.split("/")[0]
    in_place = "@" in place and (":" in host or ("@" in host and not scheme.startswith(("abfs", "wasb"))))
    return in_place or re.search(r"(?i)(secret|password|token|access_key)[^=&]*=", query) is not None
