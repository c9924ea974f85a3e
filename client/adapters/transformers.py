# SPDX-License-Identifier: Apache-2.0
"""
The KV cache of Hugging Face transformers, shared between processes through cenote.

    from cenote.client.adapters.transformers import PrefixCache

    shared = PrefixCache.connect(model)              # goes on without a cache where no daemon is
    outputs, past, loaded, saved = shared.prefill(input_ids)

A chunk is `chunk_tokens` tokens of all layers, [layers, 2, kv_heads, tokens, head_dim] in the
model's element type. Loading copies each byte once, from the pool into the tensors that the model
appends to; saving copies each byte once, from those tensors into the pool. docs/adapters/
transformers.md has the caveats, and the models that are refused.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeAlias

from cenote.client import Put, connect
from cenote.client.errors import CenoteError, ChunkLost
from cenote.client.keys import KEY_BYTES, chain

from .transformers_identity import (
    Geometry,
    NotCacheable,
    check_layers,
    empty_cache,
    geometry_of,
    manifest_for,
    plain_layers,
)

if TYPE_CHECKING:
    import os

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import DynamicCache, PreTrainedModel

    from cenote.client import Cache, Chunk, Manifest, Pool

    TokenIds: TypeAlias = torch.Tensor | Sequence[int]

__all__ = ["Counters", "NotCacheable", "Prefill", "PrefixCache", "geometry_of", "manifest_for"]

log = logging.getLogger("cenote.client.adapters.transformers")

CHUNK_TOKENS: Final = 256
SAVE_WAIT_MS: Final = 100  # a session's first extents come when it first asks for one
RETRY_S: Final = 5.0  # between attempts to reach a daemon that was not there
CONNECT_TIMEOUT_S: Final = 0.5  # of an attempt in the middle of an engine's work


@dataclass
class Counters:
    """
    What an adapter did, since it was made.

    Attributes:
        prompts: Calls of load_prefix().
        asked_tokens: Tokens of these prompts.
        loaded_tokens: Of them, tokens that came from the pool.
        loaded_bytes: Bytes copied out of the pool.
        saved_tokens: Tokens stored.
        saved_bytes: Bytes copied into the pool.
        not_cached: How often the pool could not be used, by the name of the error.
    """

    prompts: int = 0
    asked_tokens: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    saved_tokens: int = 0
    saved_bytes: int = 0
    not_cached: Counter[str] = field(default_factory=Counter)


class Prefill(NamedTuple):
    """
    A prompt, computed.

    Attributes:
        outputs: The model's, for the tokens that were computed: the last len(prompt) - loaded.
        past_key_values: The cache of the whole prompt.
        loaded: Tokens that came from the pool.
        saved: Tokens that were stored in it.
    """

    outputs: Any
    past_key_values: DynamicCache
    loaded: int
    saved: int


@dataclass(frozen=True)
class Later:
    """A namespace that no daemon was there to open: what it is for, and how to open it."""

    manifest: Manifest
    open: Callable[[], Cache]


class PrefixCache:
    """
    The shared KV cache of one model in this process.

    Use it from the thread that runs the model. Whatever happens to the pool, a call answers as if
    nothing was cached: the error is counted, and logged once. What raises is NotCacheable, for a
    cache or an input that cannot be shared at all.

    The weights must not change while it lives: they are part of the namespace's identity.

    Args:
        cache: The namespace of `manifest_for(model, ...)`.
        model: The model, in eval mode.
        geometry: What geometry_of(model) returned, if it was called already.
        verify: Check the CRC-32C of each chunk that has one before it is used.

    Raises:
        NotCacheable: The model cannot be shared, or the namespace is another model's.
    """

    def __init__(
        self,
        cache: Cache | Later,
        model: PreTrainedModel,
        *,
        geometry: Geometry | None = None,
        verify: bool = False,
    ) -> None:
        self.model: Final = model
        self.geometry: Final = geometry or geometry_of(model)
        _check_namespace(cache.manifest, self.geometry)
        self.chunk_tokens: Final = int(cache.manifest["chunk_tokens"])
        self.chunk_bytes: Final = self.geometry.chunk_bytes(self.chunk_tokens)
        self.counters: Final = Counters()
        self._verify = verify
        self._source = cache
        self._retry_at_s = 0.0
        self._logged: set[str] = set()

    @classmethod
    def open(
        cls,
        pool: Pool,
        model: PreTrainedModel,
        chunk_tokens: int = CHUNK_TOKENS,
        *,
        name: str | None = None,
        revision: str | None = None,
        verify: bool = False,
    ) -> Self:
        """
        Open the model's namespace in a pool.

        Args:
            pool: An attached pool.
            model: The model, in eval mode.
            chunk_tokens: Tokens a chunk covers; all processes that share must agree.
            name: See manifest_for().
            revision: See manifest_for(). Without one the weights are hashed, once.
            verify: Check the CRC-32C of each chunk that has one before it is used.

        Raises:
            NotCacheable: The model cannot be shared.
            PoolGone, LimitReached, Timeout: The namespace could not be opened.
        """
        shape = geometry_of(model)
        manifest = manifest_for(model, chunk_tokens, name=name, revision=revision, geometry=shape)
        return cls(pool.namespace(manifest), model, geometry=shape, verify=verify)

    @classmethod
    def connect(
        cls,
        model: PreTrainedModel,
        socket: str | os.PathLike[str] | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        *,
        name: str | None = None,
        revision: str | None = None,
        verify: bool = False,
    ) -> Self:
        """
        Do the same with a connection of its own, which need not succeed.

        Where no daemon can be reached, nothing is cached, and it is tried again with a later call,
        every 5 seconds at most.

        Args:
            model: The model, in eval mode.
            socket: As for cenote.client.connect().
            chunk_tokens: As for open(), like all that follow.
            name: See manifest_for().
            revision: See manifest_for().
            verify: See open().

        Raises:
            NotCacheable: The model cannot be shared.
        """
        shape = geometry_of(model)
        manifest = manifest_for(model, chunk_tokens, name=name, revision=revision, geometry=shape)

        def opened() -> Cache:
            pool = connect(socket, timeout_s=CONNECT_TIMEOUT_S)
            return pool.namespace(manifest, timeout_s=CONNECT_TIMEOUT_S)

        made = cls(Later(manifest, opened), model, geometry=shape, verify=verify)
        made._attached()
        return made

    # ---- loading -------------------------------------------------------------------------------

    def load_prefix(self, input_ids: TokenIds) -> tuple[DynamicCache, int]:
        """
        Return (a cache with the longest stored prefix of a prompt, how many tokens that is).

        Never the whole prompt: at least its last token is left to compute. The cache is private
        memory; no lease is held when this returns.

        Args:
            input_ids: One prompt: [n], [1, n] or a sequence of int.

        Raises:
            NotCacheable: Several prompts in one tensor: padding would shift positions.
            ValueError: The prompt is empty, or has an impossible token id.
        """
        ids = token_ids(input_ids)
        past = empty_cache(self.model)
        self.counters.prompts += 1
        self.counters.asked_tokens += len(ids)
        chunks = self._lease(ids, (len(ids) - 1) // self.chunk_tokens)
        if not chunks:
            return past, 0
        try:
            self._copy_out(chunks, past)
        finally:
            for chunk in chunks:
                chunk.release()
        tokens = len(chunks) * self.chunk_tokens
        self.counters.loaded_tokens += tokens
        self.counters.loaded_bytes += len(chunks) * self.chunk_bytes
        return past, tokens

    def load_many(self, prompts: Sequence[TokenIds]) -> list[tuple[DynamicCache, int]]:
        """Return load_prefix() of each of several prompts."""
        return [self.load_prefix(prompt) for prompt in prompts]

    def _lease(self, ids: NDArray[np.int64], count: int) -> list[Chunk]:
        """Lease the first *count* chunks of a prompt, or as many as are there and sound."""
        cache = self._attached()
        if cache is None or count < 1:
            return []
        keys = chain(ids[: count * self.chunk_tokens], self.chunk_tokens, cache.id)
        try:
            chunks = cache.get_many(keys)
        except (CenoteError, OSError) as error:
            self._without(error, "nothing is loaded")
            return []
        sound = next((i for i, c in enumerate(chunks) if not self._is_sound(c)), len(chunks))
        for chunk in chunks[sound:]:
            chunk.release()
        return chunks[:sound]

    def _is_sound(self, chunk: Chunk) -> bool:
        """Has it the right length, and its checksum, if it is to be looked at?"""
        if chunk.nbytes != self.chunk_bytes:
            return False
        try:
            if self._verify:
                chunk.verify()
        except ChunkLost as error:
            self._without(error, "the chunk is computed again")
            return False
        return True

    def _copy_out(self, chunks: list[Chunk], past: DynamicCache) -> None:
        """
        Copy chunks into *past*: views over the pool, one copy a layer and chunk.

        The cache appends with torch.cat, so that its tensors must be its own in any case.
        """
        import torch

        shape, step = self.geometry.chunk_shape(self.chunk_tokens), self.chunk_tokens
        views = [chunk.tensor(self.geometry.dtype, shape) for chunk in chunks]
        whole = (1, self.geometry.kv_heads, len(chunks) * step, self.geometry.head_dim)
        for i, (layer, device) in enumerate(zip(past.layers, self.geometry.devices, strict=True)):
            both = [torch.empty(whole, dtype=self.geometry.dtype, device=device) for _ in range(2)]
            for half, target in enumerate(both):
                for at, view in enumerate(views):
                    target[0, :, at * step : (at + 1) * step].copy_(view[i, half])
            # An update without tokens is how a layer learns its type; what it made is replaced.
            layer.update(both[0][:, :, :0], both[1][:, :, :0])
            layer.keys, layer.values = both

    # ---- saving --------------------------------------------------------------------------------

    def save(self, input_ids: TokenIds, past_key_values: DynamicCache, start: int = 0) -> int:
        """
        Store the full chunks of a prompt whose KV has been computed.

        Chunks that are there already are left alone. A full pool is waited for at most 0.1 s, once:
        what does not fit is not cached.

        Args:
            input_ids: The tokens that *past_key_values* was computed from, in order: the prompt,
                or prompt and generated tokens.
            past_key_values: Their cache.
            start: Tokens that need not be stored: what load_prefix() returned.

        Returns:
            How many tokens were stored.

        Raises:
            NotCacheable: The cache is quantised, windowed, of several sequences, of another model.
            ValueError: A token id is impossible, or start is negative.
        """
        ids = token_ids(input_ids)
        if start < 0:
            raise ValueError(f"start is {start}: give 0, or the number of tokens that were loaded")
        layers = plain_layers(past_key_values)
        held = check_layers(layers, self.geometry)
        count = min(len(ids), held) // self.chunk_tokens
        first = -(-start // self.chunk_tokens)
        cache = self._attached()
        if cache is None or first >= count:
            return 0
        keys = chain(ids[: count * self.chunk_tokens], self.chunk_tokens, cache.id)
        saved = 0
        try:
            for _ in self._store(cache, keys, layers, first):
                saved += 1
        except (CenoteError, OSError) as error:
            self._without(error, "what was computed is not cached")
        self.counters.saved_tokens += saved * self.chunk_tokens
        self.counters.saved_bytes += saved * self.chunk_bytes
        return saved * self.chunk_tokens

    def _store(self, cache: Cache, keys: bytes, layers: list[Any], first: int) -> Iterator[None]:
        """Put the chunks from *first* on that are missing; yield after each."""
        count = len(keys) // KEY_BYTES
        first += cache.match(keys[first * KEY_BYTES :])
        for i in range(first, count):
            key = keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]
            parent = keys[(i - 1) * KEY_BYTES : i * KEY_BYTES] if i else None
            with cache.put(key, self.chunk_bytes, parent, position=i, wait_ms=SAVE_WAIT_MS) as put:
                self._copy_in(put, layers, i * self.chunk_tokens)
            yield

    def _copy_in(self, put: Put, layers: list[Any], at: int) -> None:
        """
        Copy a chunk's tokens from each layer into reserved memory of the pool.

        No tensor over the memory may live when this returns: the commit would refuse.
        """
        end = at + self.chunk_tokens
        shape = self.geometry.chunk_shape(self.chunk_tokens)
        target = put.tensor(self.geometry.dtype, shape)
        for i, layer in enumerate(layers):
            target[i, 0].copy_(layer.keys.detach()[0, :, at:end])
            target[i, 1].copy_(layer.values.detach()[0, :, at:end])

    # ---- both ----------------------------------------------------------------------------------

    def prefill(self, input_ids: TokenIds, *, logits_to_keep: int = 0) -> Prefill:
        """
        Load what is stored of a prompt, compute the rest, and store that.

        Args:
            input_ids: One prompt: [n], [1, n] or a sequence of int, without padding.
            logits_to_keep: As the model's own argument: logits of the last so many tokens; 0 for
                those of all that are computed.

        Raises:
            NotCacheable: The input cannot be shared, or the model is in training mode.
            ValueError: The prompt is empty, or has an impossible token id.
        """
        import torch

        if self.model.training:
            raise NotCacheable(
                "the model is in training mode, where dropout has a say: call eval()"
            )
        past, loaded = self.load_prefix(input_ids)
        ids = torch.from_numpy(token_ids(input_ids))
        rest = ids[None, loaded:].to(self.model.device)
        options = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        with torch.no_grad():
            outputs = self.model(input_ids=rest, past_key_values=past, use_cache=True, **options)
        saved = self.save(input_ids, past, loaded)
        return Prefill(outputs, past, loaded, saved)

    def prefill_many(
        self, prompts: Sequence[TokenIds], *, logits_to_keep: int = 0
    ) -> list[Prefill]:
        """Return prefill() of each of several prompts, one after the other: later ones may hit."""
        return [self.prefill(prompt, logits_to_keep=logits_to_keep) for prompt in prompts]

    def match(self, input_ids: TokenIds) -> int:
        """Return how many tokens of a prompt load_prefix() would find now."""
        ids = token_ids(input_ids)
        count = (len(ids) - 1) // self.chunk_tokens
        cache = self._attached()
        if cache is None or count < 1:
            return 0
        try:
            keys = chain(ids[: count * self.chunk_tokens], self.chunk_tokens, cache.id)
            return cache.match(keys) * self.chunk_tokens
        except (CenoteError, OSError) as error:
            self._without(error, "nothing is loaded")
            return 0

    @property
    def cache(self) -> Cache | None:
        """The namespace; None while no daemon has been reached."""
        return None if isinstance(self._source, Later) else self._source

    def _attached(self) -> Cache | None:
        """Return the namespace, after another attempt to reach a daemon if there was none."""
        if not isinstance(self._source, Later):
            return self._source
        if time.monotonic() < self._retry_at_s:
            return None
        try:
            self._source = self._source.open()
        except (CenoteError, OSError) as error:
            self._retry_at_s = time.monotonic() + RETRY_S
            self._without(error, f"nothing is cached, and it is tried again after {RETRY_S:g} s")
            return None
        return self._source

    def _without(self, error: Exception, then: str) -> None:
        """Go on without the pool: count it, and say it once for each kind of error."""
        kind = type(error).__name__
        self.counters.not_cached[kind] += 1
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning("%s: %s; %s. Said once, counted from now on", kind, error, then)


def token_ids(input_ids: TokenIds) -> NDArray[np.int64]:
    """
    Return the token ids of one prompt as an array [n].

    Raises:
        NotCacheable: There are several prompts.
        ValueError: There are no tokens.
    """
    import numpy as np

    to_cpu = getattr(input_ids, "cpu", None)
    ids = np.asarray(to_cpu().numpy() if to_cpu is not None else input_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise NotCacheable(
            f"input_ids has shape {ids.shape}: give one prompt, or a list of them to "
            "prefill_many(); padding in a batch would shift positions"
        )
    if not len(ids):
        raise ValueError("the prompt is empty: give one token at least")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids has dtype {ids.dtype}: give integers")
    return ids.astype(np.int64, copy=False)


def _check_namespace(manifest: Manifest, geometry: Geometry) -> None:
    wanted = {
        "dtype": geometry.dtype_name,
        "layers": geometry.layers,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
    }
    wrong = {key: manifest.get(key) for key, value in wanted.items() if manifest.get(key) != value}
    if wrong:
        raise NotCacheable(
            f"the namespace has {wrong}, and the model { ({key: wanted[key] for key in wrong}) }: "
            "open the namespace of manifest_for(model)"
        )
