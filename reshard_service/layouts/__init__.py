"""Meshes, placements and rules: which rank owns which rectangles of which tensor. Pure integers, no torch."""
