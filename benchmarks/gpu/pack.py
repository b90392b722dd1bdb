"""Packs what a GPU machine without network lacks beside PyTorch: Ray, DALI and their needs, in two parts.

    .venv/bin/python benchmarks/gpu/pack.py [--out .gpu] [--python 3.12] [--architecture 90]

The versions are those that are installed here. DALI's GPU code is kept for one architecture (90: H100 and H200), and
parts that no run needs are left out: that makes 330 MiB of wheels two files of at most 56 MiB each. benchmarks/gpu's
README.md says how to use them. Needs uv and the network.
"""

import argparse
import shutil
import struct
import subprocess
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    *("ray", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13"),
    *("nvidia-nvtiff-cu13", "gast", "astunparse", "makefun", "optree", "nvtx", "tensorboardX", "typing-inspection"),
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),  # `import ray` needs these
    *("pydantic", "pydantic-core", "annotated-types"),  # `import ray.train` does
)
UNUSED = (
    *("ray/jars", "ray/rllib", "ray/serve", "ray/llm", "ray/dashboard/client"),
    *("nvidia/dali/include", "nvidia/*/include"),
)
PLATFORM = "x86_64-manylinux_2_35"
MAGIC, HEADER, ENTRY = struct.pack("<I", 0xBA55ED50), struct.Struct("<IHHQ"), struct.Struct("<HHIQ")


def install(folder: Path, python: str) -> None:
    """Unpacks the packages into the folder, for another Python than this."""
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    target = ["--target", str(folder), "--python-version", python, "--python-platform", PLATFORM]
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", *target, *wanted], check=True
    )


def remove_unused(folder: Path, python: str) -> None:
    for pattern in UNUSED:
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    tag = "cpython-" + python.replace(".", "")
    for path in folder.rglob("*.cpython-*.so"):
        if f".{tag}-" not in path.name:
            path.unlink()


def keep_architecture(path: Path, architecture: int) -> int:
    """Overwrites the GPU code of other architectures with zeros, which pack to nothing. Returns the bytes kept.

    A fat binary (section .nv_fatbin) holds a header (magic, version, header size, size) and entries of a header (kind,
    version, header size, size, ..., architecture at byte 28) and code.
    """
    raw, at, kept = bytearray(path.read_bytes()), 0, 0
    while (at := raw.find(MAGIC, at)) >= 0:
        _, format_version, header_size, size = HEADER.unpack_from(raw, at)
        entry, end = at + header_size, at + header_size + size
        if format_version != 1 or header_size != HEADER.size or end > len(raw):
            at += len(MAGIC)
            continue
        while entry < end:
            _, _, entry_header_size, code_size = ENTRY.unpack_from(raw, entry)
            (made_for,) = struct.unpack_from("<I", raw, entry + 28)
            code = entry + entry_header_size
            if made_for == architecture:
                kept += code_size
            else:
                raw[code : code + code_size] = bytes(code_size)
            entry = code + code_size
        at = end
    path.write_bytes(raw)
    return kept


def pack(folder: Path, out: Path) -> None:
    """Writes part-1.tar.xz (Ray, its needs and the libraries of others in DALI) and part-2.tar.xz (DALI)."""
    out.mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        target = out / f"part-{number}.tar.xz"
        with tarfile.open(target, "w:xz") as tar:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = path.relative_to(folder).as_posix()
                second = name.startswith("nvidia/") and not name.startswith("nvidia/dali/.libs/")
                if second == (number == 2):
                    tar.add(path, name)
        print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".gpu"))
    parser.add_argument("--python", default="3.12", help="the machine's Python (default 3.12)")
    parser.add_argument("--architecture", type=int, default=90, help="the GPU's compute capability (default 90)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(folder, args.python)
        remove_unused(folder, args.python)
        if not sum(keep_architecture(path, args.architecture) for path in sorted(folder.glob("nvidia/**/*.so*"))):
            raise SystemExit(f"DALI has no code for the architecture {args.architecture}")
        pack(folder, args.out)


if __name__ == "__main__":
    main()
