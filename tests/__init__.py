"""A package, so that test modules of the same name in different folders don't clash: every folder has an __init__."""
