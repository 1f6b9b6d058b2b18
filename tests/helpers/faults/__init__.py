"""Faults injected into real commands: kills, torn writes, full disks, damaged files; docs/faults.md says what holds."""
