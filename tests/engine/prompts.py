# SPDX-License-Identifier: Apache-2.0
"""Prompts for models of model.py: token ids that a seed decides."""

from __future__ import annotations

import random
from typing import Final

FIRST: Final = 3  # before it are the special tokens
VOCABULARY: Final = 1024


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """Return so many tokens; a longer prompt of the same seed begins with a shorter one."""
    rng = random.Random(f"prompt {seed}")
    return [rng.randrange(FIRST, VOCABULARY) for _ in range(tokens)]
