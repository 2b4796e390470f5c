from __future__ import annotations

import os

# Two pools that spin while they wait for each other's cores take many times as long as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
