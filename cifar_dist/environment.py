"""What Ray, the C library and the compilers of torch read of the environment, set in one place."""

import getpass
import json
import os

MARK = "CIFAR_DIST_CLUSTER"  # in the environment of every process of a cluster that a job has started itself
NO_HOME = "/nonexistent"  # as Debian calls the home of those who have none
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# What ties Ray's processes to another cluster or job, or has them wait for a debugger. All of it may be left over.
OF_OTHER_CLUSTERS = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_ID", JOB_CONFIG),
    *("RAY_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK", "RAY_RUNTIME_ENV_PLUGINS", "RAY_OVERRIDE_JOB_RUNTIME_ENV"),
    *("RAY_GCS_SERVER_PORT", "RAY_REDIS_ADDRESS", "RAY_REDIS_PASSWORD", "RAY_ENABLE_GCS_LEADER_ELECTION"),
    *("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT", "RAY_TMPDIR"),
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_OVERRIDE_RESOURCES"),
    *("RAY_OVERRIDE_LABELS", "RAY_RAYLET_PID", "RAY_LOG_TO_STDERR", "RAY_DEBUG", "RAY_DEBUG_POST_MORTEM"),
)


def set_up_local_cluster(mark: str, token: str, loopback: str) -> None:
    """What the processes of a cluster that is started here read: each carries `mark`, talks on the network interface
    `loopback` only, and answers those that know `token`."""
    for name in OF_OTHER_CLUSTERS:
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes its node away
    os.environ |= {
        MARK: mark,
        # Without one Ray reads or writes a token in the home folder. Ray asks for it by itself: RAY_AUTH_MODE is unset.
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what is named so is whether nodes have addresses for other machines
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }


def without_mark() -> dict[str, str]:
    """The environment for a process that is none of the cluster's."""
    return {name: value for name, value in os.environ.items() if name != MARK}


def ray_folder() -> str | None:
    """The folder that the user wants Ray's files in, if any."""
    return os.environ.get("RAY_TMPDIR") or None


def job_config_fault() -> str:
    """What is wrong with the job that `ray job submit` describes in the environment; empty if nothing is."""
    try:
        json.loads(os.environ.get(JOB_CONFIG, "{}"))
    except ValueError as error:
        return f"{JOB_CONFIG}, which `ray job submit` sets, is not JSON ({error}); unset it"
    return ""


def uses_private_ray() -> bool:
    """Whether private APIs of Ray may be used. CIFAR_DIST_PRIVATE_RAY=0 tells whether a fault is theirs."""
    return os.environ.get("CIFAR_DIST_PRIVATE_RAY", "1") != "0"


def uses_tls() -> bool:
    """Whether Ray's processes are told to speak TLS."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def cluster_address(text: str) -> str | None:
    """--address or RAY_ADDRESS; None where the job is to start a cluster itself."""
    return None if text.strip() in ("", "local") else text.strip()


def prepare_environment() -> str | None:
    """Sets what Ray reads from the environment at import; returns RAY_ADDRESS if it is set."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # whatever an older program has set it to
    if os.path.expanduser("~") == "~":  # neither HOME nor an entry in the list of users: Ray Train's import would fail
        os.environ["HOME"] = NO_HOME
    try:
        getpass.getuser()
    except (KeyError, OSError):  # likewise: torch's compiler would fail
        os.environ["USER"] = str(os.geteuid())
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use the driver's interpreter as it is
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the end and failures wait for this poll; Ray's 2 s is slow
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Workers keep freed memory: to have the kernel clear the pages of large tensors anew at each step cost a fifth
        # of Fan's steps on two cores. Read by the C library when a process starts, so by those of a local cluster.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("RAY_CLIENT_MODE", "RAY_ENABLE_AUTO_CONNECT"):  # Ray Client, through which Ray Train does not run
        os.environ.pop(name, None)
    return cluster_address(os.environ.get("RAY_ADDRESS", ""))


def ray_address() -> str | None:
    return os.environ.get("RAY_ADDRESS")


def limit_waits(seconds: int) -> None:
    """Limits the waits of Ray Train's ranks for each other, and the waits of its controller for a rank's answer."""
    limit = str(seconds)
    os.environ |= {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": limit, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": limit}
