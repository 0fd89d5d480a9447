"""What a named GPU measured, kept as JSON, and shown to readers without one."""
