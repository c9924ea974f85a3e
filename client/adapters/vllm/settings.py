# SPDX-License-Identifier: Apache-2.0
"""What an operator and a request may say: `kv_connector_extra_config`, `kv_transfer_params`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

LOGGER: Final = "vllm.cenote"  # so that vLLM formats and filters our lines
CHUNK_TOKENS: Final = 256
log = logging.getLogger(LOGGER)

VERIFY: Final = ("never", "first", "always")
SAVE: Final = ("all", "reused", "none")
TRANSFER: Final = ("chunks", "layers")
PREFIX: Final = "cenote."  # of the keys of a request's kv_transfer_params
SHOWN_MAX: Final = 64  # characters of a value in a log line
# What the stock OffloadingConnector itself reads, beside the settings of its specs: of vLLM 0.32,
# and since 0.33 the last. canonical_layout is none of them: cenote stores the engine's own layout.
OFFLOADING_KEYS: Final = frozenset(
    {"spec_name", "spec_module_path", "block_size", "blocks_per_chunk", "offload_prompt_only"}
    | {"self_describing_kv_events", "sync_load_budget_bytes"}
)
# What is decided by the stock connector, and not by a spec of it.
NOT_OFFLOADING: Final = frozenset({"min_load_tokens", "transfer"})


@dataclass(frozen=True)
class Settings:
    """
    `kv_connector_extra_config` of one engine.

    Attributes:
        socket: The daemon's; None: $CENOTE_SOCKET, else the default ones.
        chunk_tokens: Tokens of a chunk, a multiple of the engine's block size; None: the smallest
            multiple that has 256.
        verify: When a chunk's CRC-32C is compared as it is loaded: never, on its first load by
            this worker, or always.
        save: What is stored: every full chunk that is computed, those asked for before, nothing.
        min_load_tokens: A shorter hit is computed, not loaded; None: one chunk.
        transfer: Whole chunks beside the forward pass, or layer by layer within it.
    """

    socket: str | None = None
    chunk_tokens: int | None = None
    verify: str = "first"
    save: str = "all"
    min_load_tokens: int | None = None
    transfer: str = "chunks"

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any],
        also: frozenset[str] = frozenset(),
        without: frozenset[str] = frozenset(),
    ) -> Settings:
        """
        Read what the operator wrote.

        Args:
            given: kv_connector_extra_config.
            also: Keys that are not ours and belong to somebody.
            without: Ours that mean nothing here.

        Raises:
            ValueError: A key is unknown or a value is out of range; it names the right ones.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name not in without]
        unknown = sorted(set(given) - set(names) - also)
        if unknown:
            raise ValueError(
                f"kv_connector_extra_config has {', '.join(map(repr, unknown))}, which cenote does "
                f"not know: it takes {', '.join((*names, *sorted(also)))}"
            )
        made = cls(**{name: given[name] for name in names if name in given})
        made._check()
        return made

    def _check(self) -> None:
        socket: object = self.socket
        if socket is not None and (not isinstance(socket, str) or not socket):
            raise ValueError(f"socket is {self.socket!r}: give the path of the daemon's socket")
        for name, choices in (("verify", VERIFY), ("save", SAVE), ("transfer", TRANSFER)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(choices)}")
        for name in ("chunk_tokens", "min_load_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}: give a number of tokens, 1 or more")


@dataclass(frozen=True)
class Wishes:
    """
    What one request says in its `kv_transfer_params`, each key behind "cenote.".

    Attributes:
        skip_save: Store nothing of this request.
        max_load_tokens: Load at most so many tokens; None: all that are there.
        priority: Of its chunks in the pool, -128 to 127; lower goes first.
        ttl_s: Seconds after which its chunks are gone; None: never.
    """

    skip_save: bool = False
    max_load_tokens: int | None = None
    priority: int = 0
    ttl_s: int | None = None

    @classmethod
    def parse(cls, params: Mapping[Any, Any] | None) -> Wishes:
        """
        Read a request's parameters. What is wrong is logged and left out, never an error.

        A request comes from a stranger: raising here would end the engine for everybody.
        """
        if not isinstance(params, Mapping):
            return NO_WISHES
        good: dict[str, Any] = {}
        for key, value in params.items():
            if not isinstance(key, str) or not key.startswith(PREFIX):
                continue
            name = key.removeprefix(PREFIX)
            if name in _ACCEPTED and _ACCEPTED[name](value):
                good[name] = value
            else:
                log.warning(
                    "kv_transfer_params: %s=%s is left out: cenote takes cenote.skip_save (true or "
                    "false), cenote.max_load_tokens (0 or more), cenote.priority (-128 to 127) and "
                    "cenote.ttl_s (1 or more seconds)",
                    _shown(key).strip("'\""),
                    _shown(value),
                )
        return cls(**good) if good else NO_WISHES


def _shown(value: object) -> str:
    """Return a stranger's value for the log: on one line, short, whatever it is."""
    try:
        return repr(value)[:SHOWN_MAX]
    except Exception:  # noqa: BLE001  # nested too deeply, too long a number
        return f"a {type(value).__name__}"


def _whole(low: int, high: int) -> Any:
    return lambda value: type(value) is int and low <= value <= high


_ACCEPTED: Final[Mapping[str, Any]] = {
    "skip_save": lambda value: type(value) is bool,
    "max_load_tokens": _whole(0, 2**63 - 1),
    "priority": _whole(-128, 127),
    "ttl_s": _whole(1, 2**32 - 1),
}
NO_WISHES: Final = Wishes()
