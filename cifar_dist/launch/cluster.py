"""Connects to a Ray cluster, counts its resources and checks its nodes. Does not import Ray Train or torch."""

import logging
import os
import re
import socket
import sys
import threading
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist import stopping
from cifar_dist.environment import job_config_fault, uses_tls
from cifar_dist.errors import UserError, first_line
from cifar_dist.launch import preflight, ray_private
from cifar_dist.launch.local_cluster import start
from cifar_dist.launch.plan import decoded_splits
from cifar_dist.train.job import Plan

CONNECT_SECONDS = 5  # for a host to answer
JOIN_SECONDS = 30  # to join a cluster; Ray itself tries for 15 minutes
HOST_AND_PORT = re.compile(r"([^:/\s]+|\[.+\]):(\d{1,5})")
# The first bytes of an HTTP/2 client (fixed text, empty SETTINGS frame), and the type of a server's first frame.
HTTP2_PREFACE, HTTP2_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\4"


def connect(address: str | None, num_workers: int) -> None:
    """Connects to the Ray cluster at `address`, or starts one on this machine if it is None or 'local'."""
    if ray.is_initialized():
        return
    if address in (None, "local"):
        start(num_workers)
    else:
        join(str(address))
    stopping.listen()  # again, because ray.init() installs its own handlers


def join(address: str) -> None:
    """Connects to a running cluster. Raises UserError within seconds if no cluster runs at the address."""
    check_address(address)
    if fault := job_config_fault():
        raise UserError(fault)
    watch = threading.Timer(JOIN_SECONDS, give_up, [address])  # a DNS lookup that fails can take long too
    watch.daemon = True
    watch.start()
    try:
        if address == "auto":  # the cluster named in Ray's temporary folder, or one that runs on this machine
            address = ray_private.address_of_auto()
        if (match := HOST_AND_PORT.fullmatch(address)) and not uses_tls():
            check_port(match[1].strip("[]"), int(match[2]))
    except (OSError, OverflowError, ValueError) as error:
        watch.cancel()
        raise UserError(
            f"no Ray cluster answers at {address}: {first_line(error)}; check --address, or unset RAY_ADDRESS"
        ) from error
    try:
        with ray_private.own_handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(refusal(address, first_line(error))) from error
    finally:
        watch.cancel()


def refusal(address: str, reason: str) -> str:
    return (
        f"what answers at {address} does not let this job in: {reason}; is it a Ray cluster, of the same version and "
        "with the same token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)? Check --address, or unset RAY_ADDRESS"
    )


def check_port(host: str, port: int) -> None:
    """Raises OSError unless a gRPC server answers, as in a Ray cluster. Ray itself would try for minutes."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        connection.sendall(HTTP2_PREFACE)
        answer = b""
        while len(answer) < 4 and (part := connection.recv(4 - len(answer))):
            answer += part
    if answer[3:4] != HTTP2_SETTINGS:
        raise OSError(f"what listens at port {port} of {host} is not Ray")


def check_address(address: str) -> None:
    """Raises UserError unless the address is HOST:PORT or auto."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is the address of a dashboard, which `ray job submit --address` takes; --address and "
            "RAY_ADDRESS of this job are HOST:PORT of the cluster itself (6379 by default), or unset"
        )
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is an address of Ray Client, through which Ray Train does not run; submit the job with "
            "`ray job submit`, or give HOST:PORT of the cluster itself (6379 by default)"
        )
    if not HOST_AND_PORT.fullmatch(address) and address != "auto":
        raise UserError(
            f"{address!r} is no address of a Ray cluster; --address and RAY_ADDRESS are HOST:PORT, or unset"
        )


def give_up(address: str) -> None:
    """Prints an error and ends the process, because ray.init() cannot be cancelled."""
    print(f"error: {refusal(address, f'nothing has come of it in {JOIN_SECONDS} s')}", file=sys.stderr, flush=True)
    os._exit(1)


def count_resource(name: str) -> int:
    """Returns the number of CPUs or GPUs of the connected cluster."""
    return int(ray.cluster_resources().get(name, 0))


def uses_gpu(device: str, num_tasks: int = 1) -> bool:
    """Whether `auto`, `cpu` or `gpu` means a GPU on the connected cluster. Raises UserError if `gpu` finds too few."""
    num_gpus = count_resource("GPU")
    if device == "gpu" and num_gpus < num_tasks:
        raise UserError(f"{num_tasks} workers need a GPU each, the cluster has {num_gpus}; use --device cpu or fewer")
    if device == "auto" and 0 < num_gpus < num_tasks:
        print(
            f"WARNING: {num_tasks} workers need a GPU each and the cluster has {num_gpus}: running on CPUs; "
            f"--workers {num_gpus} uses GPUs",
            flush=True,
        )
    return device != "cpu" and num_gpus >= num_tasks


NODE_SECONDS = 60.0  # for a node to answer preflight's questions


def resources_per_worker(plan: Plan) -> dict[str, float]:
    """Returns the CPUs (as many as fit evenly) and GPUs of each worker. Raises UserError if workers do not fit."""
    launch = plan.launch
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    least = launch.min_workers or launch.num_workers
    gpu = uses_gpu(launch.device, least)

    def slots(cpus: int) -> int:
        return sum(min(int(n.get("CPU", 0)) // cpus, int(n.get("GPU", 0)) if gpu else 1 << 20) for n in nodes)

    max_cpus = max((int(n.get("CPU", 0)) for n in nodes), default=0)
    for wanted in range(launch.num_workers, least - 1, -1):  # all workers if they fit, else as many as fit
        for cpus in range(max_cpus, 0, -1):
            if slots(cpus) >= wanted:
                return {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    total = sum(int(n.get("CPU", 0)) for n in nodes)
    raise UserError(f"{least} workers need a CPU each, the cluster has {total} on {len(nodes)} nodes; lower --workers")


def check_nodes(plan: Plan, use_gpu: bool) -> list[preflight.Finding]:
    """Runs preflight on every node that can hold a worker."""
    run, token = plan.run.folder, uuid.uuid4().hex
    own_folder = f"{preflight.FOLDER}/{token}"  # another job of the run may run preflight at the same time
    run.create(own_folder)
    run.write(f"{own_folder}/token", token.encode())
    try:
        seen, unreachable = ask_nodes(plan, use_gpu, token)
        written = run.names(own_folder)
    finally:
        run.delete(own_folder)
        run.delete_empty(preflight.FOLDER)
        run.delete_empty("")
    found = preflight.assess(
        seen,
        plan.data.manifest,
        token=token,
        decoded=decoded_splits(plan.config, plan.data.manifest),
        use_gpu=use_gpu,
        compiles=plan.config.loop.compiles(gpu=use_gpu),
        written=written,
    )
    return [*unreachable, *found]


def ask_nodes(plan: Plan, use_gpu: bool, token: str) -> tuple[list[dict[str, Any]], list[preflight.Finding]]:
    """Returns (facts of each node, findings for nodes that do not answer).

    On the job's own cluster it gathers facts in this process, else by a task on each node. Raises UserError if a node
    does not answer and the run needs it."""
    launch, needs = plan.launch, ("CPU", "GPU") if use_gpu else ("CPU",)
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and all(n["Resources"].get(name) for name in needs)]
    where = plan.run.uri, plan.data.uri, launch.staging_folder, token
    if launch.cluster is None:
        return [preflight.gather_facts(node, *where) for node in nodes], []
    seen, unreachable = [], []
    ask = ray.remote(num_cpus=0)(preflight.gather_facts)
    pins = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    tasks = [ask.options(scheduling_strategy=p).remote(n, *where) for n, p in zip(nodes, pins, strict=True)]
    ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
    for node, task in zip(nodes, tasks, strict=True):
        try:
            seen.append(ray.get(task, timeout=0))
        except ray.exceptions.RayError as error:
            unreachable.append(preflight.Finding("answers", node, "warning", str(error).splitlines()[0]))
    if unreachable and (not launch.min_workers or not seen):  # else the run starts without these nodes
        raise UserError(
            f"a node of the cluster does not answer preflight's questions: {unreachable[0].text}; with --workers "
            "MIN:MAX the run begins without it"
        )
    return seen, unreachable


def check_cluster(plan: Plan) -> tuple[dict[str, float], list[preflight.Finding]]:
    """Connects; returns each worker's resources and the preflight findings. Raises UserError if workers do not fit."""
    connect(plan.launch.cluster, plan.launch.num_workers)
    resources = resources_per_worker(plan)
    text = f"{plan.launch.num_workers} of " + ", ".join(f"{v:g} {k}" for k, v in resources.items())
    fits = preflight.Finding("workers", "cluster", "ok", text)
    return resources, [fits, *check_nodes(plan, "GPU" in resources)]
