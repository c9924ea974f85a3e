# SPDX-License-Identifier: Apache-2.0
"""
Is a pool what it should be? Its tables and its bytes, with a daemon or without (`cenote verify`).

Nothing in here writes to a pool, and nothing in a pool can hurt it (I4): tables are copied before
they are judged, numbers are checked before they lead anywhere, loops end by the copies' sizes.
"""

from __future__ import annotations

from .crc import Checked, MappedRegion, regions_of
from .kinds import KINDS, Finding, Kind
from .offline import Abandoned, Served, abandoned, open_abandoned
from .report import Found, Report
from .verifier import Verifier

__all__ = [
    "KINDS",
    "Abandoned",
    "Checked",
    "Finding",
    "Found",
    "Kind",
    "MappedRegion",
    "Report",
    "Served",
    "Verifier",
    "abandoned",
    "open_abandoned",
    "regions_of",
]
