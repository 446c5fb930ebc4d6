"""How much sooner a request starts whose beginning is in the prefix cache: time to the first token, with and without.

    python benchmarks/prefix_cache.py [--model PATH] [--prefix 8192] [--rounds 5] [--threads 1] [--json OUT]

Each round draws a prefix and a question of 32 tokens: a request with the prefix unseen ("cold"), one with the same
prefix and another question ("memory"), the same prompt as that again ("same prompt"), and, in a new engine over the
same directory, a third question ("disk", as after a restart; loading the model isn't counted). Random tokens: what is
measured doesn't depend on their sense. The first tokens are also compared with those of an engine without the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

QUESTION = 32  # tokens after the prefix
BAR = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: upwell-nano)")
    parser.add_argument("--prefix", type=int, default=8192, help="tokens that requests share (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here")
    arguments = parser.parse_args()

    import torch

    import upwell
    from upwell import LLM, SamplingParams
    from upwell.bench.record import cpu_name
    from upwell.engine.prefix import CUT_TOKENS
    from upwell.ops.native import describe

    torch.set_num_threads(arguments.threads)
    greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    room = (arguments.prefix // 256 + 2) * 256

    def load(**options: Any) -> LLM:
        return LLM(arguments.model, max_num_seqs=1, cache_tokens=room, **options)

    def first_token(llm: LLM, prompt: list[int]) -> tuple[float, list[int]]:
        began = time.perf_counter()
        tokens = llm.generate({"prompt_token_ids": prompt}, greedy)[0].token_ids
        return time.perf_counter() - began, tokens

    times: dict[str, list[float]] = {"cold": [], "memory": [], "same prompt": [], "disk": []}
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        llm, plain = load(prefix_cache_dir=folder), load(enable_prefix_caching=False)
        vocab = llm.model.config.vocab_size

        def draw(seed: int, length: int) -> list[int]:
            return torch.randint(2, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

        first_token(llm, draw(999, 600))  # warms threads and caches of the machine
        for r in range(arguments.rounds):
            prefix = draw(r, arguments.prefix)
            questions = [draw(1000 + 10 * r + k, QUESTION) for k in range(3)]
            seconds, _ = first_token(llm, prefix + questions[0])
            times["cold"].append(seconds)
            seconds, hit = first_token(llm, prefix + questions[1])
            times["memory"].append(seconds)
            seconds, again = first_token(llm, prefix + questions[1])
            times["same prompt"].append(seconds)
            if r == 0:  # a cold run costs as much as all others
                differ += hit != first_token(plain, prefix + questions[1])[1]
            differ += again != hit
            llm.engine.close()
            llm = load(prefix_cache_dir=folder)
            seconds, _ = first_token(llm, prefix + questions[2])
            times["disk"].append(seconds)
        llm.engine.close()
        kept = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())

    cold = statistics.median(times["cold"])
    rows = [
        {
            "name": name, "median_ms": 1e3 * statistics.median(row), "least_ms": 1e3 * min(row),
            "most_ms": 1e3 * max(row), "sooner": cold / statistics.median(row),
        }
        for name, row in times.items()
    ]  # fmt: skip
    print(f"{describe()} · prefix of {arguments.prefix} tokens, cuts every {CUT_TOKENS} · {kept >> 20} MiB on disk")
    print(f"{'time to first token':<20}{'median':>10}{'least':>10}{'most':>10}{'sooner':>10}")
    for row in rows:
        print(f"{row['name']:<20}{row['median_ms']:>7.1f} ms{row['least_ms']:>7.1f} ms{row['most_ms']:>7.1f} ms"
              f"{row['sooner']:>9.1f}x")  # fmt: skip
    print(f"first tokens that differ: {differ}; bar: memory at least {BAR:g}x sooner")
    if arguments.json:
        record = {
            "date": date.today().isoformat(),
            "command": sys.argv,
            "machine": {
                "cpu": cpu_name(), "threads": arguments.threads,
                "torch": torch.__version__, "python": platform.python_version(), "kernels": describe(),
                "upwell": upwell.__version__,
            },
            "model": str(arguments.model or "upwell-nano"), "prefix": arguments.prefix, "question": QUESTION,
            "rounds": arguments.rounds, "differ": differ, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
