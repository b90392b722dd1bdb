"""The Ray cluster of a job: which addresses are taken, where a local one keeps its files, and how it ends."""

import contextlib
import dataclasses
import json
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch.distributed as dist

from cifar_dist import environment as environ
from cifar_dist.errors import UserError
from cifar_dist.job_settings import ClusterSettings
from cifar_dist.launch import cluster, local_cluster, ray_private, trainer
from cifar_dist.launch.local_cluster import GUARDIAN, LONGEST_SOCKET, SOCKET

SETTINGS_FRAME = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


# Addresses.


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """The port of a server on loopback that sends `answer` to each client, or nothing and stays."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    clients.append(client)
                    if answer is not None:
                        client.recv(1000)
                        client.sendall(answer)
                        client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for client in clients:
            client.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What ray.init() is called with, which then does nothing."""
    calls: list[dict] = []
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    monkeypatch.delenv(environ.JOB_CONFIG, raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    return calls


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "address of a dashboard"),
        ("https://head/", "address of a dashboard"),
        ("ray://127.0.0.1:10001", "address of Ray Client"),
        ("garbage", "'garbage' is no address of a Ray cluster"),
        ("Local", "'Local' is no address of a Ray cluster"),
        ("a b:1", "'a b:1' is no address of a Ray cluster"),
        ("host:", "'host:' is no address of a Ray cluster"),
        ("::1:6379", "'::1:6379' is no address of a Ray cluster"),
        ("tcp://127.0.0.1:6379", "is no address of a Ray cluster"),
        ("127.0.0.1:123456", "is no address of a Ray cluster"),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at no-such-host.invalid:6379"),
        ("[::1]:1", "no Ray cluster answers at [::1]:1"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: [Errno 111] Connection refused"),
    ],
)
def test_an_address_where_no_cluster_is(address: str, message: str, asked: list[dict]) -> None:
    with pytest.raises(UserError) as error:
        cluster.join(address)
    assert message in str(error.value)
    assert not asked


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "timed out"),
        (b"HTTP/1.0 400 Bad request\r\n\r\n", "is not Ray"),
        (b"", "is not Ray"),
        (b"+OK", "not Ray"),
    ],
    ids=["silent", "http", "closes", "short"],
)
def test_what_listens_there_is_not_ray(answer: bytes | None, reason: str, asked: list[dict]) -> None:
    start = time.monotonic()
    with server(answer) as port, pytest.raises(UserError, match=reason):
        cluster.join(f"127.0.0.1:{port}")
    assert time.monotonic() - start < 5
    assert not asked


def test_a_cluster_that_is_joined_is_left_as_it_is(asked: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)  # type: ignore[attr-defined]
    before = dict(os.environ)
    with server(SETTINGS_FRAME) as port:
        cluster.join(f"127.0.0.1:{port}")
    assert [set(call) for call in asked] == [{"address", "log_to_driver", "logging_level"}]
    assert dict(os.environ) == before
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER  # type: ignore[attr-defined]


def test_auto_is_an_address_of_ray_that_is_tried_first(asked: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray has it from a file, which a cluster that has ended may have left."""
    found = "127.0.0.1:1"
    monkeypatch.setattr(
        ray._private.services, "canonicalize_bootstrap_address", lambda address: found * (address == "auto")
    )
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .* refused"):
        cluster.join("auto")
    with server(SETTINGS_FRAME) as port:
        found = f"127.0.0.1:{port}"
        cluster.join("auto")
    assert [call["address"] for call in asked] == [found]


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), ConnectionError("a"), ray.exceptions.AuthenticationError("a")])
def test_a_cluster_that_refuses_is_one_sentence(
    error: Exception, asked: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with (
        server(SETTINGS_FRAME) as port,
        pytest.raises(UserError, match=r"does not let this job in: a.*RAY_AUTH_TOKEN") as e,
    ):
        cluster.join(f"127.0.0.1:{port}")
    assert "\n" not in str(e.value)
    assert not asked


def test_a_cluster_that_hangs_is_given_up() -> None:
    """ray.init() cannot be interrupted: the process ends."""
    code = (
        "import time, ray; from cifar_dist.launch import cluster; cluster.JOIN_SECONDS = 0.5;"
        "cluster.uses_tls = lambda: True;"
        "ray.init = lambda **_: time.sleep(60); cluster.join('127.0.0.1:1')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: what answers at 127.0.0.1:1 does not let this job in: nothing has come of it")
    assert len(done.stderr.splitlines()) == 1


def test_a_description_of_a_job_that_is_not_json_is_named(asked: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environ.JOB_CONFIG, "{")
    with server(SETTINGS_FRAME) as port, pytest.raises(UserError, match=r"RAY_JOB_CONFIG_JSON_ENV_VAR.* is not JSON"):
        cluster.join(f"127.0.0.1:{port}")
    monkeypatch.setenv(environ.JOB_CONFIG, json.dumps({}))
    with server(SETTINGS_FRAME) as port:
        cluster.join(f"127.0.0.1:{port}")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), (" ", None), ("local", None), (" local\n", None), ("auto", "auto"), (" 127.0.0.1:1 ", "127.0.0.1:1")],
)
def test_an_empty_address_means_a_cluster_of_ones_own(
    text: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": text})
    assert ClusterSettings().cluster == expected
    given = ClusterSettings(address=text)
    assert given.cluster == expected
    assert environ.prepare_environment() == expected
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "elsewhere:1"})
    assert ClusterSettings(address=text).cluster == dataclasses.replace(given).cluster == expected


# The environment.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A copy that may be changed."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ  # type: ignore[return-value]


def test_what_is_left_of_other_clusters_does_not_reach_ones_own(environment: dict[str, str]) -> None:
    for name in environ.OF_OTHER_CLUSTERS:
        environment[name] = "left over"
    environ.set_up_local_cluster("mark", "token", "lo")
    assert not set(environ.OF_OTHER_CLUSTERS) & set(environment)
    assert {"RAY_AUTH_MODE", "RAY_REDIS_ADDRESS", "RAY_USE_TLS", environ.JOB_CONFIG} <= set(environ.OF_OTHER_CLUSTERS)
    assert environment["RAY_AUTH_TOKEN"] == "token"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment[environ.MARK] == "mark"
    assert environ.MARK not in environ.without_mark()


def test_old_switches_are_set_right(environment: dict[str, str]) -> None:
    environment |= {"RAY_TRAIN_V2_ENABLED": "0", "RAY_CLIENT_MODE": "1", "RAY_ENABLE_AUTO_CONNECT": "1"}
    environ.prepare_environment()
    assert environment["RAY_TRAIN_V2_ENABLED"] == "1"
    assert not {"RAY_CLIENT_MODE", "RAY_ENABLE_AUTO_CONNECT"} & set(environment)


def test_a_user_without_home_and_name_gets_both(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with any number as the user: Ray Train cannot be imported without a home."""

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        environment.pop(name, None)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    environ.prepare_environment()
    assert environment["HOME"] == environ.NO_HOME
    assert environment["USER"] == str(os.geteuid())
    environment |= {"HOME": "/home/me", "USER": "me"}
    environ.prepare_environment()
    assert (environment["HOME"], environment["USER"]) == ("/home/me", "me")


def test_ray_is_told_to_stay_on_loopback_and_what_keeps_it_from_starting_is_one_sentence(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict = {}

    def fail(**settings: object) -> None:
        given.update(settings, clusters=ray._private.ray_constants.ENABLE_RAY_CLUSTER)  # type: ignore[attr-defined]
        given["blocked"] = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)  # type: ignore[attr-defined]
    monkeypatch.setattr(local_cluster, "Guardian", lambda _: None)
    monkeypatch.setattr(local_cluster, "num_cpus", lambda: 3)
    monkeypatch.setattr(local_cluster, "temporary_folder", lambda: "/t")
    with pytest.raises(UserError, match=r"Ray did not start on this machine: no room; .* /t/session_latest/logs$"):
        local_cluster.start(2)
    assert (given["address"], given["_node_ip_address"], given["clusters"]) == ("local", "127.0.0.1", False)
    assert (given["_temp_dir"], given["num_cpus"]) == ("/t", 3)
    assert signal.SIGTERM in given["blocked"]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


# Ray's folder.


@pytest.fixture
def place(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Gives TMPDIR (a short path, else the tests' own is too long) and returns the base of Ray's folder."""
    environment.pop("RAY_TMPDIR", None)
    made: list[Path] = []

    def choose(folder: str) -> Path:
        monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
        made.append(Path(local_cluster.temporary_folder()))
        assert stat.S_IMODE(made[-1].parent.stat().st_mode) == 0o700  # Ray opens its own to all
        return made[-1].parent.parent

    yield choose
    for path in made:
        assert len(f"{path}{SOCKET}") <= LONGEST_SOCKET
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as folder:
        yield Path(folder)


def test_ray_keeps_its_files_in_the_temporary_folder_or_where_the_user_says(
    place: Callable[[str], Path], short: Path, environment: dict[str, str]
) -> None:
    (short / "t").mkdir()
    (short / "r").mkdir()
    assert place(str(short / "t")) == short / "t"
    environment["RAY_TMPDIR"] = str(short / "r")
    assert place(str(short / "t")) == short / "r"
    environment["RAY_TMPDIR"] = "/nowhere"
    assert place("/nowhere") == Path("/tmp")


@pytest.mark.parametrize("name", ["long" * 20, "a b", "äö", "tab\t"])
def test_a_folder_that_ray_cannot_use_is_passed_over(name: str, place: Callable[[str], Path], short: Path) -> None:
    (short / name).mkdir()
    assert place(str(short / name)) == Path("/tmp")


def test_a_folder_that_another_user_could_have_made_is_passed_over(place: Callable[[str], Path], short: Path) -> None:
    (short / "elsewhere").mkdir()
    (short / f"cifar_dist-ray-{os.geteuid()}").symlink_to(short / "elsewhere")
    assert place(str(short)) == Path("/tmp")


def test_without_any_folder_it_is_said(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment["RAY_TMPDIR"] = "/" + "long" * 20
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"path of at most \d\d plain characters, and /long.* and /dev/shm") as error:
        local_cluster.temporary_folder()
    longest = "/" + "x" * (int(str(error.value).split("at most ")[1].split()[0]) - 1)
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(local_cluster, "private_folder", lambda _: None)
    environment["RAY_TMPDIR"] = longest
    assert local_cluster.temporary_folder().startswith(longest)
    environment["RAY_TMPDIR"] = longest + "x"
    assert local_cluster.temporary_folder().startswith("/tmp")


def test_without_a_temporary_folder_it_is_said(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    environment.pop("RAY_TMPDIR", None)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match="set TMPDIR to one"):
        local_cluster.temporary_folder()


# GPUs.


@pytest.mark.parametrize(
    ("device", "num_gpus", "num_workers", "expected"),
    [
        *(("auto", 0, 1, False), ("auto", 1, 1, True), ("auto", 4, 2, True), ("auto", 1, 2, False)),
        *(("cpu", 4, 1, False), ("gpu", 2, 2, True)),
    ],
)
def test_auto_takes_gpus_where_they_suffice(device, num_gpus, num_workers, expected, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(num_gpus), "CPU": 8.0})
    assert cluster.uses_gpu(device, num_workers) is expected
    said = capsys.readouterr().out
    assert ("2 workers need a GPU each and the cluster has 1: running on CPUs" in said) is (
        (device, num_gpus, num_workers) == ("auto", 1, 2)
    )


def test_too_few_gpus_that_were_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    with pytest.raises(UserError, match="2 workers need a GPU each, the cluster has 1; use --device cpu or fewer"):
        cluster.uses_gpu("gpu", 2)


# The process that ends a cluster.


def sleeper(mark: str) -> subprocess.Popen:
    return subprocess.Popen(["sleep", "60"], env={"A": "b", environ.MARK: mark, "Z": ""}, start_new_session=True)


def start(mark: str, seconds: float = 20, before: str = "") -> subprocess.Popen:
    command = [sys.executable, "-S", "-E", "-c", before + GUARDIAN, f"{environ.MARK}={mark}", str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def mark() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


def test_the_guardian_ends_its_cluster_and_nothing_else(mark: str) -> None:
    mine, others = [sleeper(mark), sleeper(mark)], [sleeper(f"{mark}0"), sleeper(mark[:-1]), sleeper("")]
    guardian = start(mark)
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # which a whole job may get
            time.sleep(0.5)
            guardian.send_signal(number)
        assert [p.poll() for p in (guardian, *mine, *others)] == [None] * 6
        guardian.communicate(timeout=10)  # closes its stdin, as the kernel does when the driver ends
        assert guardian.returncode == 0
        assert [p.wait(5) for p in mine] == [-signal.SIGKILL] * 2
        assert [p.poll() for p in others] == [None] * 3
    finally:
        for process in (guardian, *mine, *others):
            process.kill()
            process.wait()


def test_the_guardian_ends_what_writes_to_the_session_but_not_what_reads_it(mark: str, tmp_path: Path) -> None:
    """Ray's agents write their title over their environment, so they show no mark."""
    session, other = tmp_path / "session_1", tmp_path / "session_10"
    for folder in (session, other):
        folder.mkdir()
        (folder / "agent.log").write_text("")
    shell = 'exec sleep 60 {}"$1/agent.log"'
    processes = {
        name: subprocess.Popen(["sh", "-c", shell.format(how), "sh", folder], env={})
        for name, how, folder in (("writer", ">>", session), ("reader", "<", session), ("other", ">>", other))
    }
    mine = (session / "driver.log").open("w")  # of the process that started the guardian
    guardian = start(mark)
    try:
        time.sleep(0.5)
        guardian.communicate(str(session), timeout=20)
        assert processes["writer"].wait(5) == -signal.SIGKILL
        assert [processes[name].poll() for name in ("reader", "other")] == [None] * 2
    finally:
        mine.close()
        for process in (guardian, *processes.values()):
            process.kill()
            process.wait()


def test_the_guardian_gives_up_on_what_it_may_not_end_and_does_not_keep_a_core_busy(mark: str) -> None:
    before = (
        "import atexit, os\n"
        "def refuse(*_): raise PermissionError\n"
        "calls, os.kill, list_folder = [], refuse, os.listdir\n"
        "os.listdir = lambda path: calls.append(path) or list_folder(path)\n"
        "atexit.register(lambda: print(len(calls)))\n"
    )
    process, guardian = sleeper(mark), start(mark, 1, before)
    try:
        output, _ = guardian.communicate(timeout=10)
        assert guardian.returncode == 0
        assert 2 <= int(output) <= 12
        assert process.poll() is None
    finally:
        for p in (process, guardian):
            p.kill()
            p.wait()


def test_the_guardian_waits_for_the_end_of_the_process_that_started_it(mark: str) -> None:
    code = (
        "import os, sys; from cifar_dist.launch import local_cluster; local_cluster.Guardian(sys.argv[1]);"
        "print(local_cluster.guardians[0].process.pid, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = sleeper(mark)
    driver = subprocess.Popen([sys.executable, "-c", code, mark], **pipes)  # type: ignore[call-overload]
    try:
        guardian = Path(f"/proc/{int(driver.stdout.readline())}")
        time.sleep(0.5)
        assert guardian.exists()
        assert process.poll() is None
        driver.kill()
        assert process.wait(10) == -signal.SIGKILL
        end = time.monotonic() + 10
        while guardian.exists() and (guardian / "cmdline").read_bytes():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        for p in (process, driver):
            p.kill()
            p.wait()
        driver.stdin.close()
        driver.stdout.close()


# The process group.


class Workers:
    """Stands for Ray's worker group: keeps what is to be called on each worker."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.calls: list[tuple] = []

    def __len__(self) -> int:
        return self.num_workers

    def execute(self, *_: object) -> None:
        pass

    def execute_async(self, *_: object, **__: object) -> list:
        return []

    def execute_single_async(self, rank: int, function: Callable, *args: object, **settings: object) -> None:
        self.calls.append((rank, function, args, settings))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> trainer.LocalBackend:
    monkeypatch.setattr(ray, "get", lambda tasks, **_: tasks)
    monkeypatch.setattr(ray_private, "session_folder", lambda: str(tmp_path))
    return trainer.LocalBackend()


def test_each_start_of_the_workers_has_a_file_of_its_own(backend: trainer.LocalBackend, tmp_path: Path) -> None:
    settings, files = trainer.LocalTorchConfig(backend="gloo", timeout_s=7), []
    assert settings.backend_cls is trainer.LocalBackend
    for num_workers in (2, 3):  # the second time, the first group was killed and has not been shut down
        workers = Workers(num_workers)
        backend.on_start(workers, settings)
        assert [call[0] for call in workers.calls] == list(range(num_workers))
        assert {call[1] for call in workers.calls} == {trainer.join_group}
        for rank, _, args, more in workers.calls:
            assert args == ("gloo", args[1], rank)
            assert more == {"world": num_workers, "timeout_seconds": 7}
        (path,) = {Path(call[2][1]) for call in workers.calls}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert path.parent.parent == tmp_path
        assert not path.exists()
        files.append(path)
    assert files[0] != files[1]
    backend.on_shutdown(Workers(3), settings)
    assert not list(tmp_path.iterdir())


def test_a_group_by_a_file_opens_no_port_and_keeps_its_time_limit(tmp_path: Path) -> None:
    trainer.join_group("gloo", str(tmp_path / "group"), 0, world=1, timeout_seconds=7)
    try:
        store = dist.distributed_c10d._get_default_store()
        assert isinstance(store.underlying_store, dist.FileStore)
        assert store.underlying_store.timeout.total_seconds() == 7
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("owns", "expected"), [(True, trainer.LocalTorchConfig), (False, trainer.GroupConfig)])
def test_only_a_cluster_of_ones_own_has_its_workers_meet_in_a_file(owns: bool, expected: type) -> None:
    config = trainer.torch_config(owns_cluster=owns, backend="gloo", limit_seconds=7)
    assert type(config) is expected
    assert (config.backend, config.timeout_s) == ("gloo", 7)
