"""Which nodes a cluster has, and which are about to leave."""

import ray


def alive() -> set[str]:
    """Ids of the nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def draining() -> set[str]:
    """Ids of the nodes that were told to leave, as spot nodes are before they are taken."""
    from ray._private.state import state  # Ray has no public name for it; its own Ray Train asks here as well

    return set(state.get_draining_nodes())
