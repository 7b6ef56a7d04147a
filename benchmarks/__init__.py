"""Measurements: conversions against ``cp`` and torch's own tools, and planning a million chunks."""
