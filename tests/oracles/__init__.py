"""Oracles that we did not write: real models trained by transformers and torch in gloo runs, and torch's own loaders.

Two sides live here. ``models``, ``checkpoints``, ``sharing``, ``command`` and ``gang.run_gangs`` are for tests and
import no torch. ``training``, ``saving`` and ``resuming`` run in ranks that ``python -m tests.oracles.gang`` forks.
"""
