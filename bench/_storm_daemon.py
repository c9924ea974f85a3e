# SPDX-License-Identifier: Apache-2.0
"""
The daemon of bench/storm.py and bench/bench_restart.py: cenoted itself, which may die as often as
it likes. The real one begins with an empty pool after three dirty starts within a minute.
"""

from __future__ import annotations

import sys

from cenote.daemon.main import main
from cenote.shm import takeover

if __name__ == "__main__":
    takeover.DIRTY_STARTS_S = 0  # type: ignore[misc]  # a constant of theirs
    sys.exit(main())
