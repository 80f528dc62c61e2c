"""Which nodes a cluster has, and which are about to leave."""

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def alive() -> set[str]:
    """Ids of the nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def here() -> NodeAffinitySchedulingStrategy:
    """Places an actor on the node of this process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def draining() -> set[str]:
    """Ids of the nodes that were told to leave, as spot nodes are before they are taken."""
    from ray._private.state import state  # Ray has no public name for it; its own Ray Train asks here as well

    return set(state.get_draining_nodes())
