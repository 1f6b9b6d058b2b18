"""Faults injected into real commands: kills, torn writes, full disks, damaged files. See docs/faults.md."""
