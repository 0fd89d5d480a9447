"""Which layers' outputs a model uses for more than feeding the next layer.

Where neighbours share a segment, what the first one returns is not there any more: a
model that uses it gets the segment's output instead, and nobody is told.
"""

import itertools
from typing import NamedTuple

from helpers.timeline import tensors_in


class Numbers(NamedTuple):
    """Autograd's numbers of a layer's nodes, which count up as nodes are made."""

    first: int
    end: int = 0  # the first one that is not the layer's any more
    output: int | None = None  # of the node that made its output, if one did


def node_number(output: object) -> int | None:
    """Tell the number of the node that made an output's first tensor, if one did."""
    node = getattr(next(tensors_in(output), None), "grad_fn", None)
    return node._sequence_nr() if node else None


def used_elsewhere(output: object, layers: dict[str, Numbers]) -> set[str]:
    """Walk the graph of a model's output; find layers whose own others use as well.

    Args:
        layers: in the order of their calls, each fed by the one before.
    """
    following = dict(itertools.pairwise(layers))
    returned = {layers[name].output: name for name in following}
    found, seen = set(), set()
    edges = [(-1, tensor.grad_fn) for tensor in tensors_in(output)]
    while edges:
        user, node = edges.pop()
        if node is None:
            continue
        number = node._sequence_nr()
        if number in returned:
            name = returned[number]
            after = layers[following[name]]
            if not after.first <= user < after.end:
                found.add(name)
        if node not in seen:
            seen.add(node)
            edges += [(number, used) for used, _ in node.next_functions]
    return found
