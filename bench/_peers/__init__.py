# SPDX-License-Identifier: Apache-2.0
"""
Systems that can hold KV chunks for several processes of one host, behind one interface.

What is measured and how is in README.md; `python bench/peers.py` runs it. Modules of this folder
are also loaded by the peers' own environments, which have numpy and the peer, not cenote.
"""

from __future__ import annotations
