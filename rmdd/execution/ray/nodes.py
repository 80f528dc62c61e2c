"""Functions that list the nodes of a Ray cluster that are alive or about to leave the cluster."""

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def alive() -> set[str]:
    """Return the ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return a scheduling strategy that places an actor on the node of this process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def draining() -> set[str]:
    """Return the ids of the nodes that are about to leave, such as spot nodes after the cloud's notice."""
    from ray._private.state import state  # Ray has no public function for this; Ray Train uses this private one

    return set(state.get_draining_nodes())
