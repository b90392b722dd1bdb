"""How many CPUs a process may use, from control groups as files."""

import os
from pathlib import Path

import pytest

from cifar_dist import cpus


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quota(tmp_path: Path, membership: str) -> float | None:
    file = tmp_path / "membership"
    file.write_text(membership)
    return cpus.cgroup_cpus(tmp_path / "cgroup", file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("400000 100000\n", 4),
        ("50000 100000\n", 0.5),
        ("", None),
        ("max", None),
        ("many 100000\n", None),
        ("100000 0\n", None),
    ],
)
def test_version_2_has_one_file(text: str, expected: float | None, tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "a", cpu__max=text)
    assert quota(tmp_path, "0::/a\n") == expected


@pytest.mark.parametrize(("us", "expected"), [("-1", None), ("200000", 2), ("0x", None)])
def test_version_1_has_two_files_in_the_folder_of_its_controller(
    us: str, expected: float | None, tmp_path: Path
) -> None:
    for folder in ("cpu", "cpu,cpuacct"):
        group(tmp_path / folder / "cgroup" / folder / "a", cpu__cfs_quota_us=us, cpu__cfs_period_us="100000")
        assert quota(tmp_path / folder, "4:memory:/b\n3:cpu,cpuacct:/a\n1:name=systemd:/a\n") == expected


def test_the_least_quota_of_the_groups_above_counts(tmp_path: Path) -> None:
    group(tmp_path / "cgroup/a/b", cpu__max="800000 100000")
    group(tmp_path / "cgroup/a", cpu__max="300000 100000")
    assert quota(tmp_path, "0::/a/b\n") == 3


def test_in_a_container_the_group_may_be_mounted_at_the_top(tmp_path: Path) -> None:
    """Its path is the host's, of which the container has no folders."""
    group(tmp_path / "cgroup", cpu__max="200000 100000")
    assert quota(tmp_path, "0::/system.slice/docker-1.scope\n") == 2
    assert quota(tmp_path, "0::/../..\n") == 2


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpus.cgroup_cpus(tmp_path, tmp_path / "none") is None
    assert quota(tmp_path, "") is None


@pytest.mark.parametrize(
    ("bound", "limit", "expected"),
    [({0, 1, 2, 3}, None, 4), ({0}, None, 1), ({0, 1, 2, 3}, 2.9, 2), ({0, 1}, 8.0, 2), ({0, 1}, 0.5, 1)],
)
def test_the_lesser_of_binding_and_quota_counts(
    bound: set[int], limit: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: bound)
    monkeypatch.setattr(cpus, "cgroup_cpus", lambda: limit)
    assert cpus.num_cpus() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx512_bf16 amx_bf16 ept\n", {"sse2", "avx512_bf16", "amx_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16 cpuid\n", {"asimd", "sve", "bf16"}),
        ("processor\t: 0\n", set()),
        (None, set()),
    ],
)
def test_instructions_for_arithmetic_are_those_that_linux_names(tmp_path: Path, text: str | None, expected: set[str]):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpus.instruction_sets(tmp_path / "cpuinfo") == expected | {os.uname().machine}


def test_instructions_are_those_that_torch_names_where_it_does():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch names none")
    has = torch.cpu.get_capabilities()
    for name in ("avx2", "avx512_bf16", "amx_bf16"):
        assert (name in cpus.instruction_sets()) == bool(has.get(name))
