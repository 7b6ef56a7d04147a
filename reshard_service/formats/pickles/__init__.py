"""Pickles read without running them: scanned first, then loaded with an allow-list of inert stand-ins.

A checkpoint's pickles (``.metadata``, ``data.pkl``) name a dozen classes. Whoever reads one says which, and what stands
in for each; every other name is refused by :class:`~reshard_service.errors.UnsafeSource`, and nothing it names is
imported. See :func:`safe_load` for one held in memory, :mod:`child` for one too large to be scanned.
"""

from reshard_service.formats.pickles.load import safe_load
from reshard_service.formats.pickles.scan import PickleLimits
from reshard_service.formats.pickles.standins import InertDict, Opaque

__all__ = ["InertDict", "Opaque", "PickleLimits", "safe_load"]
