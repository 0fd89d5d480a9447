"""The nested dynamic program over memory slots that checkpointing planners start from.

Beaumont et al., "Optimal Re-Materialization Strategies for Heterogeneous Chains"
(rotor). A segment may be checkpointed again when it is recomputed, which the
workbook's plans are not, and bytes are counted in slots, rounded up. It takes
O(N³ · slots); the slots are one row of numpy, which is as fast as Python can be here.
"""

import numpy as np

from helpers.planner import Chain


def nested_least_cost(chain: Chain, budget_bytes: int, slots: int = 500) -> float:
    """Find the least recompute cost of nested checkpointing within a budget."""
    n, stages = len(chain), chain.stages
    unit = (budget_bytes - chain.static_bytes) / slots

    def in_slots(n_bytes: int) -> int:
        return min(int(np.ceil(n_bytes / unit)), slots + 1)

    def shifted(costs: np.ndarray, held: int) -> np.ndarray:
        """Give the costs that are left when some slots are held."""
        return np.concatenate([np.full(held, np.inf), costs])[: slots + 1]

    def from_need(costs: np.ndarray, need: int) -> np.ndarray:
        costs = costs.copy()
        costs[:need] = np.inf
        return costs

    forward = np.cumsum([0.0] + [stage.recompute_cost for stage in stages])
    outputs = [in_slots(stage.output_bytes) for stage in stages]
    kept = [in_slots(stage.kept_bytes) for stage in stages]
    needs = [in_slots(need) for need in chain.kept_needs]
    peaks = [in_slots(stage.forward_peak_bytes) for stage in stages]
    loss = from_need(np.zeros(slots + 1), in_slots(chain.loss_need(False)))
    after = {(n, n): loss} | {(i + 1, i): np.zeros(slots + 1) for i in range(n - 1)}
    after[n, n - 1] = loss
    for length in range(n):
        for first in range(n - length):
            last = first + length
            best = from_need(shifted(after[first + 1, last], kept[first]), needs[first])
            peak = peaks[first]
            for cut in range(first + 1, last + 1):
                rest = shifted(after[cut, last], outputs[cut - 1])
                again = forward[cut - 1] - forward[first]
                again += stages[cut - 1].last_recompute_cost
                found = from_need(rest + after[first, cut - 1] + again, peak)
                best = np.minimum(best, found)
                peak = max(peak, outputs[cut - 1] + peaks[cut])
            after[first, last] = best
    return float(after[0, n - 1][slots])
