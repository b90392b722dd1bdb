"""The cluster that a job starts itself: who can reach it, in which environment it starts, and what is left of it."""

import ipaddress
import os
import re
import signal
from pathlib import Path

from job_process import Job, read_metrics, train_args, wait_until

# Each wakes up over 100 times a second, and so slows down the step where every core computes.
USELESS = ("DatasetManager", "PlacementGroupCleaner", "_AutoscalingCoordinator", "log_monitor", "ray-dashboard-")
# What cannot be so, or is left over from other clusters and older versions.
ODD = {
    **dict.fromkeys(("HOME", "USER", "LOGNAME"), "/dev/null"),
    **dict.fromkeys(("TMPDIR", "RAY_TMPDIR", "PYTHONPATH", "RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT"), "/nowhere"),
    **dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://192.0.2.1:1"),
    **dict.fromkeys(("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_OVERRIDE_RESOURCES", "RAY_NAMESPACE"), "{left over"),
    **dict.fromkeys(("RAY_USE_TLS", "RAY_CLIENT_MODE", "RAY_ENABLE_AUTO_CONNECT", "RAY_DEBUG_POST_MORTEM"), "1"),
    **{"RAY_TRAIN_V2_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_REDIS_ADDRESS": "192.0.2.1:1"},
    **{"OMP_NUM_THREADS": "64", "GLOO_SOCKET_IFNAME": "none0"},
}


def address_of(hexadecimal: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """As /proc/net/tcp has it: each four bytes backwards."""
    raw = bytes.fromhex(hexadecimal)
    address = ipaddress.ip_address(b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4)))
    return getattr(address, "ipv4_mapped", None) or address


def listening(pids: list[int]) -> dict[int, list]:
    """The addresses at which each process listens."""
    sockets = {}
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/net", file).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = address_of(fields[1].partition(":")[0])
    found: dict[int, list] = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(link)
            except FileNotFoundError:
                continue
            if name in sockets:
                found.setdefault(pid, []).append(sockets[name])
    return found


def test_the_reader_of_addresses() -> None:
    found = [str(address_of(text)) for text in ("0100007F", "00000000", "0" * 32, "0000000000000000FFFF00000100007F")]
    assert found == ["127.0.0.1", "0.0.0.0", "::", "127.0.0.1"]


def test_nobody_else_reaches_it_and_nothing_is_left_of_it(tiny_uri: str, tmp_path: Path) -> None:
    """In an odd environment; a worker is killed, so that its group starts a second time; then the driver."""
    job = Job(*train_args(tiny_uri, tmp_path, "run", 2, "--epochs", "1000"), env=ODD, local=True)

    def num_epochs() -> int:
        assert job.process.poll() is None, job.wait()
        return sum(line["kind"] == "epoch" for line in read_metrics(tmp_path / "run"))

    def check() -> list[int]:
        reached = listening(job.family())
        workers = job.family("ray::RayTrainWorker")
        assert len(workers) == 2
        assert {job.process.pid, *job.family("gcs_server"), *job.family("raylet/raylet"), *workers} <= set(reached)
        assert {str(address) for addresses in reached.values() for address in addresses} == {"127.0.0.1"}
        assert job.family("ray::TrainController")
        return workers

    wait_until(lambda: num_epochs() >= 1)
    first = check()
    # A failure of workers has Ray's coordinator count the nodes anew, which starts it.
    assert [name for name in USELESS if job.family(name)] == []
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: not set(first) & set(job.family("ray::RayTrainWorker")))
    done = num_epochs()
    wait_until(lambda: num_epochs() > done)
    check()
    assert len(job.family("CIFAR_DIST_CLUSTER=")) == 1
    job.process.kill()
    job.process.wait()
    wait_until(lambda: not job.family(), timeout=20)
    job.log.seek(0)
    assert re.search(r"2 workers of \d+ CPU threads each", job.log.read())
