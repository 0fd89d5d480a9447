"""What one training step needs: measured on a device, or predicted without one.

Names are imported when they are asked for, so that ``predict`` stands on its own.
"""

from helpers import lazily

_HOMES = {
    "StepReport": "report",
    "plain_step_flops": "report",
    "Loss": "step",
    "Step": "step",
    "Misfit": "faults",
    "failing_layer": "faults",
    "is_out_of_memory": "faults",
    "time_step_ms": "device",
    "training_step": "step",
    "GivenOptimizer": "predicted",
    "predict": "predicted",
    "report_of": "predicted",
    "measure": "measured",
    "measure_plans": "measured",
    "measuring_plans": "measured",
    "steps_of_a_plan": "measured",
    "Verification": "verified",
    "verify": "verified",
    "verifying_plan": "verified",
    "VERIFYING_STEPS": "verified",
    "memory_limit": "limits",
    "largest_batch": "limits",
    "free_memory": "device",
    "left_as_found": "_as_found",
    "memory_bytes": "device",
    "placed": "device",
    "random_numbers_kept": "device",
    "too_large": "device",
    "usable_device": "device",
}
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
