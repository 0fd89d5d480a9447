"""What a named GPU measured, kept as JSON, and shown to readers without one."""

from helpers import lazily

_FOUND = "FOLDER MODELS NOTHING Pair Recorded Recording RecordingError"
_FOUND += " all_recorded find_recorded recordings"
_HOMES = dict.fromkeys(_FOUND.split(), "recorded")
_HOMES |= dict.fromkeys("Comparison compared error_table summed_up".split(), "compare")
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
