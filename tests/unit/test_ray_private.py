"""Ray's private APIs are as the job uses them, and what is missing is a warning."""

import inspect

import pytest
import ray

from cifar_dist.launch import ray_private, trainer
from cifar_dist.launch.ray_private import API


@pytest.mark.parametrize("name", API)
def test_the_locked_ray_has_it(name):
    assert ray_private.has(name), f"Ray {ray.__version__} has no {API[name].path}: the job would do without it"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_is_called_is_called_as_ray_defines_it():
    """A test on a cluster would see most of this as a job that is slower, not as a failure."""
    get = ray_private.get
    assert {"destroy_process_group"} <= {*parameters(get("leave_group"))}
    assert parameters(get("set_variables")) == []
    assert parameters(get("sigterm")) == ["sigterm_handler"]
    assert parameters(get("address"))[0] == "addr"
    assert parameters(get("actors"))[:3] == ["actor_id", "job_id", "actor_state_name"]
    assert hasattr(get("group_callback"), "on_worker_group_start")
    assert {"after_controller_start", "_maybe_send_resource_request"} <= {*dir(get("fixed_scaling"))}
    assert {"on_start", "on_shutdown"} <= {*dir(get("backend"))}
    node = ray._private.node.Node
    assert {"kill_log_monitor", "kill_all_processes", "get_session_dir_path"} <= {*dir(node)}
    assert {"check_alive", "allow_graceful"} <= {*parameters(node.kill_all_processes)}
    assert set(ray_private.own_cluster_settings("/t")) == {"_node_ip_address", "_temp_dir"}


def test_with_all_of_them_nothing_is_warned_of():
    assert ray_private.warning() is None


def test_one_that_is_missing_is_a_warning_that_says_what_is_lost(monkeypatch):
    gone = API["cleaner"]._replace(path="ray.train.v2._internal.gone:Gone")
    monkeypatch.setitem(API, "cleaner", gone)
    monkeypatch.setitem(API, "context", API["context"]._replace(path="ray.train:gone_too"))
    assert ray_private.get("cleaner") is None
    assert ray_private.a_node_is_leaving() is False
    text = ray_private.warning()
    assert text.startswith(f"Ray {ray.__version__} lacks 2 of the private functions that this job uses: ")
    assert "helper processes take some CPU time from training" in text
    assert "no checkpoint is stored when a node is about to be taken away" in text


def test_without_any_of_them_the_public_api_is_used(monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_PRIVATE_RAY", "0")
    assert {ray_private.get(name) for name in API} == {None}
    text = ray_private.warning()
    assert text.startswith(f"CIFAR_DIST_PRIVATE_RAY=0 switches off {len(API)} of the private functions")
    assert {text.count(loss) for api in API.values() for loss in api.losses} == {1}
    assert ray_private.own_cluster_settings("/t") == {}
    assert ray_private.session_folder() is None
    assert ray_private.address_of_auto() == "auto"
    assert trainer.start_limits(1.0) == []
    ray_private.look_for_nodes()
    ray_private.end_workers()
    ray_private.trim_own_cluster()
    ray_private.forget_token()
    with ray_private.own_handlers():
        pass
