"""``python -m benchmarks``: conversions against cp and torch. (The planner's is ``benchmarks/million_chunks.py``.)"""

import sys

from benchmarks.measuring import MeasurementFailed
from benchmarks.throughput import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeasurementFailed as failure:
        sys.exit(f"benchmark failed: {failure}")
