"""Reads finished runs: tables."""
