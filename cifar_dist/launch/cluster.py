"""A Ray cluster: connecting to it, what it has, and checks of its nodes. Ray Train and torch are not imported."""

import logging
import os
import re
import socket
import sys
import threading
import uuid

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist import stopping
from cifar_dist.data.staged import use_decoded
from cifar_dist.environment import job_config_fault, uses_tls
from cifar_dist.errors import UserError, first_line
from cifar_dist.launch import preflight, ray_private
from cifar_dist.launch.local_cluster import start
from cifar_dist.storage import Folder
from cifar_dist.train.job import Plan

CONNECT_SECONDS = 5  # for a host to answer
JOIN_SECONDS = 30  # for a cluster to take the driver in; Ray itself tries for a quarter of an hour
HOST_AND_PORT = re.compile(r"([^:/\s]+|\[.+\]):(\d{1,5})")
# What a client of HTTP/2 sends first: a fixed text, and a frame of 0 settings; and the type of a server's first frame.
HTTP2_PREFACE, HTTP2_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\4"


def connect(address: str | None, num_workers: int) -> None:
    """Connects to the Ray cluster at `address`, or starts one on this machine if it is None or 'local'."""
    if ray.is_initialized():
        return
    if address in (None, "local"):
        start(num_workers)
    else:
        join(str(address))
    stopping.listen()  # ray.init() has put handlers of its own in place


def join(address: str) -> None:
    """Connects to a running cluster. Raises UserError within seconds where there is none."""
    check_address(address)
    if fault := job_config_fault():
        raise UserError(fault)
    watch = threading.Timer(JOIN_SECONDS, give_up, [address])  # names that no server resolves take long, too
    watch.daemon = True
    watch.start()
    try:
        if address == "auto":  # the cluster that Ray's file in the temporary folder names, or one that runs here
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
    """Raises OSError unless a gRPC server answers, as a Ray cluster's is; Ray itself would try for minutes."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        connection.sendall(HTTP2_PREFACE)
        answer = b""
        while len(answer) < 4 and (part := connection.recv(4 - len(answer))):
            answer += part
    if answer[3:4] != HTTP2_SETTINGS:
        raise OSError(f"what listens at port {port} of {host} is not Ray")


def check_address(address: str) -> None:
    """Raises UserError for an address of another kind than HOST:PORT or auto."""
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
    """Ends the process: ray.init() cannot be called back."""
    print(f"error: {refusal(address, f'nothing has come of it in {JOIN_SECONDS} s')}", file=sys.stderr, flush=True)
    os._exit(1)


def count_resource(name: str) -> int:
    """CPUs or GPUs of the connected cluster."""
    return int(ray.cluster_resources().get(name, 0))


def uses_gpu(device: str, num_tasks: int = 1) -> bool:
    """Whether `auto`, `cpu` or `gpu` means a GPU on the connected cluster. Raises UserError if there are too few."""
    num_gpus = count_resource("GPU")
    gpu = device == "gpu" or (device == "auto" and num_gpus > 0)
    if gpu and num_gpus < num_tasks:
        raise UserError(f"{num_tasks} workers need a GPU each, the cluster has {num_gpus}; use --device cpu or fewer")
    return gpu


NODE_SECONDS = 60.0  # for a node to answer preflight's questions


def resources_per_worker(plan: Plan) -> dict[str, float]:
    """CPUs (as many as fit evenly) and GPUs for each worker. Raises UserError if the cluster cannot hold them."""
    launch = plan.launch
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    least = launch.min_workers or launch.num_workers
    gpu = uses_gpu(launch.device, least)

    def places(cpus: int) -> int:
        return sum(min(int(n.get("CPU", 0)) // cpus, int(n.get("GPU", 0)) if gpu else 1 << 20) for n in nodes)

    most = max((int(n.get("CPU", 0)) for n in nodes), default=0)
    for wanted in range(launch.num_workers, least - 1, -1):  # all of them if they fit, else as many as do
        for cpus in range(most, 0, -1):
            if places(cpus) >= wanted:
                return {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    total = sum(int(n.get("CPU", 0)) for n in nodes)
    raise UserError(f"{least} workers need a CPU each, the cluster has {total} on {len(nodes)} nodes; lower --workers")


def check_nodes(plan: Plan, use_gpu: bool) -> list[preflight.Finding]:
    """Preflight on every node that can hold a worker: here at once on a cluster of our own, else by a task on each."""
    launch, run, token = plan.launch, Folder(plan.launch.run_uri), uuid.uuid4().hex
    mine = f"{preflight.FOLDER}/{token}"  # another start of the run may be looking too
    run.create(mine)
    run.write(f"{mine}/token", token.encode())
    needs = ("CPU", "GPU") if use_gpu else ("CPU",)
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and all(n["Resources"].get(name) for name in needs)]
    where = launch.run_uri, plan.data_uri, launch.staging_folder, token
    seen, silent = [], []
    try:
        if launch.address is None:
            seen = [preflight.look(node, *where) for node in nodes]
        else:
            look = ray.remote(num_cpus=0)(preflight.look)
            pins = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
            tasks = [look.options(scheduling_strategy=p).remote(n, *where) for n, p in zip(nodes, pins, strict=True)]
            ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
            for node, task in zip(nodes, tasks, strict=True):
                try:
                    seen.append(ray.get(task, timeout=0))
                except ray.exceptions.RayError as error:
                    silent.append(preflight.Finding("answers", node, "warning", str(error).splitlines()[0]))
            if silent and (not launch.min_workers or not seen):  # else the run goes on with the others
                raise UserError(
                    f"a node of the cluster does not answer preflight's questions: {silent[0].text}; with --workers "
                    "MIN:MAX the run begins without it"
                )
        written = run.names(mine)
    finally:
        run.delete(mine)
        run.delete_empty(preflight.FOLDER)
        run.delete_empty("")
    data = plan.config.data
    decoded = use_decoded(
        plan.manifest.image_shape("train"), plan.manifest.num_rows("train"), data.cache, data.cache_budget_mib
    )
    return [*silent, *preflight.judge(seen, plan.manifest, token, decoded, use_gpu, written)]


def check_cluster(plan: Plan) -> tuple[dict[str, float], list[preflight.Finding]]:
    """Connects; returns each worker's resources and preflight's findings. Raises UserError if workers do not fit."""
    connect(plan.launch.address, plan.launch.num_workers)
    resources = resources_per_worker(plan)
    text = f"{plan.launch.num_workers} of " + ", ".join(f"{v:g} {k}" for k, v in resources.items())
    fits = preflight.Finding("workers", "cluster", "ok", text)
    return resources, [fits, *check_nodes(plan, "GPU" in resources)]
