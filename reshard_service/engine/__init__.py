"""Executes a plan: reads ranges, fills buffers, writes files in place, checks as it goes, and commits at the end."""
