# SPDX-License-Identifier: Apache-2.0
"""
An engine in this very process, with scheduler and worker (VLLM_ENABLE_V1_MULTIPROCESSING=0).

    python inside_engine.py '{"engine": arguments of vllm.LLM, "socket": PATH,
                              "prompts": [[tokens, chunks in the pool behind it], ...]}'

Each prompt is answered by itself, and the prefix cache reset behind it, at once. Before the next
one the daemon has seen what was stored. Prints one line of JSON: for each prompt [tokens found, did
the reset succeed?].
"""

from __future__ import annotations

import json
import sys
import threading

from cenote.client import Pool, connect


def wait_for(pool: Pool, chunks: int) -> None:
    """Return when so many chunks are linked: a commit is not answered."""
    pause = threading.Event()
    while pool.stats(timeout_s=60.0).chunks < chunks:
        pause.wait(0.01)


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["engine"])
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=1)
    said = []
    pool = connect(asked["socket"], role="reader", timeout_s=60.0)
    for prompt, chunks in asked["prompts"]:
        (answer,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        said.append([answer.num_cached_tokens, bool(llm.reset_prefix_cache())])
        wait_for(pool, chunks)
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
