"""Slow, obvious versions of what the library does fast: what the tests compare against."""
