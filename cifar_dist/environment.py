"""Reads and sets the environment variables of Ray, the C library and torch's compilers, all in one place."""

import contextlib
import getpass
import json
import os
from collections.abc import Iterator

MARK = "CIFAR_DIST_CLUSTER"  # set in every process of a cluster that the job started
NO_HOME = "/nonexistent"  # Debian's name for the home folder of users without one
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Variables that tie Ray's processes to another cluster or job, or make them wait for a debugger. They may be left over.
OF_OTHER_CLUSTERS = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_ID", JOB_CONFIG),
    *("RAY_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK", "RAY_RUNTIME_ENV_PLUGINS", "RAY_OVERRIDE_JOB_RUNTIME_ENV"),
    *("RAY_GCS_SERVER_PORT", "RAY_REDIS_ADDRESS", "RAY_REDIS_PASSWORD", "RAY_ENABLE_GCS_LEADER_ELECTION"),
    *("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT", "RAY_TMPDIR"),
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_OVERRIDE_RESOURCES"),
    *("RAY_OVERRIDE_LABELS", "RAY_RAYLET_PID", "RAY_LOG_TO_STDERR", "RAY_DEBUG", "RAY_DEBUG_POST_MORTEM"),
)

# For processes that read pictures: memory that is no longer needed goes back to the system. The thresholds are above a
# picture of a few megapixels: else its pages would be fetched anew for each copy.
FRUGAL = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
    "MALLOC_TOP_PAD_": str(1 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def set_up_local_cluster(mark: str, token: str, loopback: str) -> None:
    """Sets the environment of the processes of a cluster that this process starts.

    Each process carries `mark`, uses only the network interface `loopback`, and answers only clients with `token`."""
    for name in OF_OTHER_CLUSTERS:
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a local node is not preempted
    os.environ |= {
        MARK: mark,
        # Else Ray reads or writes a token in the home folder. With RAY_AUTH_MODE unset, Ray requires the token.
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # really means: nodes have external addresses
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }


def without_mark() -> dict[str, str]:
    """Returns the environment for a process that does not belong to the cluster."""
    return {name: value for name, value in os.environ.items() if name != MARK}


def ray_folder() -> str | None:
    """Returns the user's folder for Ray's files, or None."""
    return os.environ.get("RAY_TMPDIR") or None


def job_config_fault() -> str:
    """Returns the fault of the job description that `ray job submit` puts into the environment, or ''."""
    try:
        json.loads(os.environ.get(JOB_CONFIG, "{}"))
    except ValueError as error:
        return f"{JOB_CONFIG}, which `ray job submit` sets, is not JSON ({error}); unset it"
    return ""


def uses_private_ray() -> bool:
    """Whether private APIs of Ray may be used. CIFAR_DIST_PRIVATE_RAY=0 switches them off, to find their faults."""
    return os.environ.get("CIFAR_DIST_PRIVATE_RAY", "1") != "0"


def uses_tls() -> bool:
    """Whether Ray's processes use TLS."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def cluster_address(text: str) -> str | None:
    """Returns the address in --address or RAY_ADDRESS, or None if the job starts its own cluster."""
    return None if text.strip() in ("", "local") else text.strip()


def prepare_environment() -> str | None:
    """Sets variables that Ray reads at import. Returns RAY_ADDRESS, or None if it is unset."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # an older program may have set another value
    if os.path.expanduser("~") == "~":  # neither HOME nor an entry in /etc/passwd: importing Ray Train would fail
        os.environ["HOME"] = NO_HOME
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no user name: torch's compiler would fail
        os.environ["USER"] = str(os.geteuid())
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use the driver's interpreter
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon Ray notices the end and failures; its default is 2 s
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Workers keep freed memory. Otherwise the kernel clears the pages of large tensors at every step, which cost a
        # fifth of Fan's step time on two cores. The C library reads these when a process starts: only in new processes.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("RAY_CLIENT_MODE", "RAY_ENABLE_AUTO_CONNECT"):  # Ray Client, which Ray Train does not support
        os.environ.pop(name, None)
    return cluster_address(os.environ.get("RAY_ADDRESS", ""))


@contextlib.contextmanager
def frugal_memory() -> Iterator[None]:
    """Lets processes that start meanwhile give memory back to the system, unlike those that train.

    With the settings for training, a process that decodes pictures would keep all that it ever needed."""
    before = {name: os.environ.get(name) for name in FRUGAL}
    os.environ |= FRUGAL
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def set_up_compiler(cache_folder: str, num_processes: int) -> None:
    """Sets where torch's compiler keeps what it has compiled, and in how many processes it compiles.

    By default it starts one per CPU of the host, for each worker. The folder must be the user's own: code is loaded
    from it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache_folder)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(num_processes))


def chosen_c_compiler() -> str | None:
    """Returns the C compiler that the user has chosen, or None."""
    return os.environ.get("CC") or None


def ray_address() -> str | None:
    return os.environ.get("RAY_ADDRESS")


def limit_waits(seconds: int) -> None:
    """Limits how long Ray Train's ranks wait for each other, and how long its controller waits for a rank's answer."""
    limit = str(seconds)
    os.environ |= {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": limit, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": limit}
