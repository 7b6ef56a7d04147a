"""From two catalogues to a plan: intersection, coverage proof, panels, batches and the figures of a dry run. Pure."""
