"""What speculative decoding brings nano: its plans for held-out questions, one at a time, with and without drafts.

    python benchmarks/speculation.py [--questions N] [--drafts K] [--rounds R] [--dtype D] [--json OUT]

Four engines over one model take turns, question by question: without drafts; without and with MTP under the plan
grammar's mask (forced tokens are drafts too); and the plain model with MTP but no mask. Decoding is timed from the
first token of a plan to its last; plans with and without drafts must be the same. Medians over rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from upwell.analyst.ask import MAX_PLAN_TOKENS, PlanMask, column_orders, prompt_ids
from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.linking import link
from upwell.analyst.prompt import render_prompt
from upwell.analyst.rules import draft_plan
from upwell.analyst.sources import open_table
from upwell.devices import resolve_dtype
from upwell.engine import LLM, SamplingParams

QUESTIONS = Path(__file__).parent / "questions"


def cases(llm: LLM, count: int) -> list[tuple[dict[str, Any], PlanMask]]:
    """Prompts with their masks, spread over the tables."""
    rows = [json.loads(line) for line in (QUESTIONS / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    made, tables = [], {}
    for row in rows[:: max(1, len(rows) // count)][:count]:
        if row["table"] not in tables:
            tables[row["table"]] = open_table(QUESTIONS / "tables" / f"{row['table']}.csv")
        profile = tables[row["table"]].profile
        linked = link(row["question"], profile)
        order = column_orders(profile, linked, 1)[0]
        text = render_prompt(profile, linked, order, draft_plan(profile, linked))
        mask = PlanMask(PlanGrammar(profile, linked.slots, order), llm.tokenizer)
        made.append(({"prompt_token_ids": prompt_ids(llm.tokenizer, text)}, mask))
    return made


def decode(llm: LLM, prompt: dict[str, Any], params: SamplingParams, mask: PlanMask | None) -> tuple[list[int], float]:
    """A completion's tokens, and the seconds from its first one to its last."""
    tokens: list[int] = []
    began = 0.0
    for delta in llm.stream(prompt, params, token_mask=mask):
        if not tokens:
            began = time.perf_counter()
        tokens += delta.token_ids
    return tokens, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--drafts", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="auto", help="as `upwell serve` takes it (default: auto, FP32)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    plain = LLM(device="cpu", dtype=resolve_dtype(args.dtype), speculative_tokens=0, enable_prefix_caching=False)
    options = {"enable_prefix_caching": False}
    engines = {
        ("plain", True): plain,
        ("drafts", True): LLM.from_model(plain.model, plain.tokenizer, speculative_tokens=args.drafts, **options),
        ("plain", False): LLM.from_model(plain.model, plain.tokenizer, speculative_tokens=0, **options),
        ("drafts", False): LLM.from_model(plain.model, plain.tokenizer, speculative_tokens=args.drafts, **options),
    }
    work = cases(plain, args.questions)
    end = work[0][1].end
    gc.freeze()  # as `upwell serve` does
    speeds: dict[tuple[str, bool], list[float]] = {key: [] for key in engines}
    different = 0
    for turn in range(args.rounds + 1):
        spent, made = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
        for prompt, mask in work:
            # As `upwell ask`: a greedy plan; without the mask, as many tokens as a plan has at the very most.
            params = SamplingParams(temperature=0.0, max_tokens=MAX_PLAN_TOKENS, stop_token_ids=[end], ignore_eos=True)
            outputs = {}
            for key, llm in engines.items():
                outputs[key], seconds = decode(llm, prompt, params, mask if key[1] else None)
                spent[key] += seconds
                made[key] += len(outputs[key]) - 1
            different += sum(outputs["plain", masked] != outputs["drafts", masked] for masked in (True, False))
        if turn:  # the first one warms up
            for key in engines:
                speeds[key].append(made[key] / spent[key])
    rows = []
    for masked in (True, False):
        before, after = (statistics.median(speeds[name, masked]) for name in ("plain", "drafts"))
        stats = engines["drafts", masked].engine.stats()
        row = {
            "mask": masked, "plain_tok_s": before, "drafts_tok_s": after, "speedup": after / before,
            "proposed": stats.draft_proposed, "accepted": stats.draft_accepted,
            "tokens_a_plan": made["plain", masked] / len(work) + 1,
            "plain": speeds["plain", masked], "drafts": speeds["drafts", masked],
        }  # fmt: skip
        rows.append(row)
        share = stats.draft_accepted / max(1, stats.draft_proposed)
        print(f"{'plan mask' if masked else 'no mask':10s} plain {before:7.0f} tok/s   drafts {after:7.0f} tok/s   "
              f"{after / before:.2f}x   accepted {share:.0%} of {stats.draft_proposed}")  # fmt: skip
    print(f"{different} of {2 * len(work) * (args.rounds + 1)} plans differ")
    if args.json is not None:
        result = {
            "date": time.strftime("%Y-%m-%d"), "dtype": args.dtype, "questions": len(work), "rows": rows,
            "different": different,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
