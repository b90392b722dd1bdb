"""Counts the CPUs that this process may use, and names the instructions that they have.

A container's limit or a CPU binding may allow fewer CPUs than exist."""

import os
import platform
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
ARITHMETIC = r"sse|avx|amx|fma|f16c|asimd|sve|bf16|i8mm"


def num_cpus() -> int:
    """Returns the CPUs that the process's CPU binding and its control group's quota allow, at least 1."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    return max(1, bound if quota is None else min(bound, int(quota)))


def cgroup_cpus(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Returns the smallest quota, in CPUs, of the process's control group and its parents, or None without a quota.

    Supports cgroup versions 1 and 2. In a container the group's path may be the host's, although only its lower end is
    mounted. The search for parents then ends at the mount, which is the container's own group.
    """
    found = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 1 has a folder for each set of controllers, and usually a link for each single controller.
        mount = next((root / name for name in (controllers, "cpu") if (root / name).is_dir()), root)
        group = mount / path.strip("/")
        while True:
            if (quota := quota_of(group)) is not None:
                found.append(quota)
            if group == mount:
                break
            group = group.parent
    return min(found, default=None)


def quota_of(group: Path) -> float | None:
    """Returns a control group's own quota in CPUs, or None without a quota."""
    try:
        if (group / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return float(quota) / float(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the processor's architecture and its instructions for arithmetic, as Linux names them: 'amx_bf16', 'sve'.

    Not asked of torch: its version 2.10 does not name them. Without the file, returns the architecture alone."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)  # of x86 or ARM, and of the first CPU
    named = line[1].split() if line else []
    return frozenset([platform.machine(), *(name for name in named if re.match(ARITHMETIC, name))])
