# SPDX-License-Identifier: Apache-2.0
"""
An engine in this very process, with scheduler and worker (VLLM_ENABLE_V1_MULTIPROCESSING=0).

    python inside_engine.py '{"engine": arguments of vllm.LLM, "socket": PATH,
                              "prompts": [[tokens, chunks in the pool behind it], ...]}'

Each prompt is answered by itself, and the prefix cache reset behind it, at once. Before the next
one the daemon has seen what was stored; before the first one the engine is attached. Prints one
line of JSON: for each prompt [tokens found, did the reset succeed?].
"""

from __future__ import annotations

import json
import sys
import threading

from cenote.client import Pool, connect

CHUNK = 256
LOOKS = 20  # for a chunk of an engine that may not be attached yet


def wait_for(pool: Pool, chunks: int, looks: int | None = None) -> bool:
    """Return when so many chunks are linked: a commit is not answered."""
    pause = threading.Event()
    while pool.stats(timeout_s=60.0).chunks < chunks:
        if looks is not None and (looks := looks - 1) < 0:
            return False
        pause.wait(0.01)
    return True


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["engine"])
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=1)
    said = []
    pool = connect(asked["socket"], role="reader", timeout_s=60.0)
    first, asked_before = asked["prompts"][0][0], 0
    while not wait_for(pool, 1, LOOKS):  # it attaches by itself, some time after it was made
        asked_before += 1
        other = {"prompt_token_ids": [*[asked_before] * 32, *first[: CHUNK - 32]]}
        llm.generate(other, params, use_tqdm=False)
        llm.reset_prefix_cache()
    before = pool.stats(timeout_s=60.0).chunks
    for prompt, chunks in asked["prompts"]:
        (answer,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        said.append([answer.num_cached_tokens, bool(llm.reset_prefix_cache())])
        wait_for(pool, before + chunks)
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
