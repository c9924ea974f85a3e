# SPDX-License-Identifier: Apache-2.0
"""
An engine in this very process, with scheduler and worker (VLLM_ENABLE_V1_MULTIPROCESSING=0).

    python inside_engine.py '{"engine": arguments of vllm.LLM, "prompts": [...]}'

Each prompt is answered by itself, and the prefix cache reset behind it, at once. Prints one line of
JSON: for each prompt [tokens found, did the reset succeed?].
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["engine"])
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=1)
    said = []
    for prompt in asked["prompts"]:
        (answer,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        said.append([answer.num_cached_tokens, bool(llm.reset_prefix_cache())])
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
