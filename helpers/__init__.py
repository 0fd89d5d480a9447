"""Checkpoint, timeline and measurement code behind the notebooks."""
