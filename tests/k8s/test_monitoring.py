"""The component `monitoring`: what it adds to an overlay, and that its dashboard asks for what there is.

That the figures are really exported is tested in tests/cluster/test_telemetry.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from manifests import ROOT, Documents, Rendered, faults, render, schema_faults
from test_manifests import examples, with_component

from cifar_dist.launch.progress import GAUGES

OURS = {f"ray_cifar_dist_{name}" for name in GAUGES}
OF_RAY = {"ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_gpus_utilization"}


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "k8s" / "components" / "monitoring" / "dashboard.json").read_text())


def queries() -> list[str]:
    """Every PromQL expression, the variable filled in as Grafana does."""
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return [expression.replace("$run", "deck_fan|deck_resnet50v2") for expression in expressions]


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.fixture
def monitored(tmp_path: Path) -> Documents:
    return with_component(tmp_path, "monitoring")


def test_it_changes_nothing_of_the_job(monitored: Documents) -> None:
    added = [d for d in monitored if d["metadata"]["name"] in ("my-cifar-dist-metrics", "my-cifar-dist-dashboard")]
    added += [d for d in monitored if d["kind"] == "PodMonitor"]
    rest = [d for d in monitored if d not in added]
    assert sorted(d["kind"] for d in added) == ["ConfigMap", "NetworkPolicy", "PodMonitor"]
    assert sorted(d["kind"] for d in rest) == sorted(d["kind"] for d in render("gpu"))
    assert faults(rest) == []
    for document in added:
        assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "cifar-dist"
        if document["kind"] != "PodMonitor":
            assert schema_faults(json.dumps(document)) == ()


def test_the_docs_show_it(monitored: Documents) -> None:
    shown = examples("Kustomization")[3]
    assert shown["components"] == ["../../components/monitoring"]
    assert {d["kind"] for d in monitored} >= {"PodMonitor", "RayJob"}


def test_prometheus_finds_and_reaches_head_and_workers(monitored: Documents) -> None:
    job = Rendered([d for d in monitored if d["metadata"]["name"] != "my-cifar-dist-dashboard"])
    (monitor,) = [d for d in monitored if d["kind"] == "PodMonitor"]
    (policy,) = [d for d in monitored if d["metadata"]["name"] == "my-cifar-dist-metrics"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression["operator"] == "In"
    found = {
        name
        for name, template in job.templates.items()
        if wanted <= template["metadata"]["labels"].items()
        and template["metadata"]["labels"][expression["key"]] in expression["values"]
    }
    assert found == {"head", "worker workers"}
    # KubeRay gives each Ray container the port `metrics`, 8080, unless a template names ports itself.
    assert [e["port"] for e in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    assert not any("ports" in container for container in job.containers.values())
    (ingress,) = policy["spec"]["ingress"]
    assert ingress["ports"] == [{"port": 8080, "protocol": "TCP"}]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job.templates["head"]["metadata"]["labels"].items()


def test_grafana_finds_the_dashboard(monitored: Documents) -> None:
    (config,) = [d for d in monitored if d["metadata"]["name"] == "my-cifar-dist-dashboard"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["dashboard.json"]) == dashboard()


def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it() -> None:
    for expression in queries():
        promql_parser.parse(expression)
        assert metrics_of(expression) <= OURS | OF_RAY, expression
    (variable,) = [v for v in dashboard()["templating"]["list"] if v["name"] == "run"]
    shown = {metric for expression in [*queries(), variable["query"]] for metric in metrics_of(expression)}
    assert shown == OURS | OF_RAY


def test_a_mistyped_query_would_be_found() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum by (run ray_cifar_dist_epoch")


def test_the_panels_lie_side_by_side() -> None:
    panels = dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (p["gridPos"] for p in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(p["description"] for p in panels if p["type"] != "row")
