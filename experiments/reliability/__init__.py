"""Harnesses that kill, stop and feed nonsense: what docs/reference/reliability.md measures."""
