"""Ray Train's trainer without helper processes of no use to a run: each wakes up over 100 times a second, and where all
cores compute every time costs both the thread that it interrupts and those that wait for that one."""

from typing import Any

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy


def a_node_is_leaving() -> bool:
    """Whether Ray has told this worker that the node of some worker is about to be taken away. ray.train's own
    get_preemption_info asks all workers each time, and waits for one that hangs."""
    return get_internal_train_context().preemption_context.preemption_info is not None


class FixedScaling(FixedScalingPolicy):
    """Without Ray's autoscaling coordinator: for a cluster that no autoscaler grows."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for no resources."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(TorchTrainer):
    """TorchTrainer for train functions that use no Ray data sets.

    `owns_cluster`: the cluster was started here and ends with this process. Then nothing has to look after the workers'
    placement group when the controller dies (which also asks the dashboard every second, so there must be one), and
    a fixed number of workers is asked of no autoscaler.
    """

    def __init__(self, *args: Any, owns_cluster: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._owns_cluster = owns_cluster

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        unused: list[type] = [DatasetsCallback]
        if self._owns_cluster:
            unused.append(PlacementGroupCleanerCallback)
        if self._owns_cluster and not self.scaling_config.elasticity_enabled:  # type: ignore[attr-defined]
            parts["scaling_policy"] = FixedScaling(self.scaling_config)  # type: ignore[arg-type]
        else:
            # The controller needs this actor and waits for it: they may as well start side by side.
            get_or_create_autoscaling_coordinator()
        parts["callbacks"] = [c for c in parts["callbacks"] if not isinstance(c, tuple(unused))]
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
