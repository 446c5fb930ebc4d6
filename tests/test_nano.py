"""The embedded model as shipped: format and size, its trained MTP and indexer, and how well it does its job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from upwell.analyst.ask import Asker
from upwell.analyst.linking import link
from upwell.analyst.prompt import render_prompt
from upwell.analyst.rules import choose_columns, draft_plan
from upwell.analyst.sources import open_table
from upwell.config import ModelConfig
from upwell.engine.llm import nano_path
from upwell.model import Transformer
from upwell.nano.geometry import NANO

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "benchmarks" / "questions"
DEV = ROOT / "upwell" / "nano" / "dev"
sys.path.insert(0, str(QUESTIONS))

import judge  # noqa: E402
import predictors  # noqa: E402


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker()


@pytest.fixture(scope="module")
def model(asker: Asker) -> Transformer:
    return asker.llm.model


def test_ships_as_official_checkpoint_with_every_part_on() -> None:
    path = nano_path()
    assert sum(file.stat().st_size for file in path.iterdir()) < 20 * 2**20
    config = ModelConfig.from_file(path / "config.json")
    assert config == NANO
    assert set(config.compress_ratios) == {0, config.csa_ratio, config.hca_ratio}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert (config.quant_method, config.expert_dtype, config.num_nextn_predict_layers) == ("fp8", "fp4", 1)


def test_size(model: Transformer) -> None:
    from upwell.checkpoint.inspect import inspect_target

    total = inspect_target(str(nano_path()))["parameters"]["total"]
    assert 5e6 <= total <= 20e6


def plans(asker: Asker, n: int) -> list[tuple[list[int], int]]:
    """Prompts with nano's own greedy plans behind them: ids, and where the plan begins."""
    from upwell.analyst.ask import MAX_PLAN_TOKENS, PlanMask, prompt_ids
    from upwell.analyst.grammar import PlanGrammar
    from upwell.engine import SamplingParams

    out = []
    lines = (DEV / "questions.jsonl").read_text().splitlines()
    tables = {}
    for line in lines[:: len(lines) // n][:n]:
        item = json.loads(line)
        table = tables.setdefault(item["table"], open_table(DEV / "tables" / f"{item['table']}.csv"))
        linked = link(item["question"], table.profile)
        order = choose_columns(table.profile, linked)
        prompt = render_prompt(table.profile, linked, order, draft_plan(table.profile, linked))
        ids = prompt_ids(asker.llm.tokenizer, prompt)
        mask = PlanMask(PlanGrammar(table.profile, linked.slots, order), asker.llm.tokenizer)
        params = SamplingParams(temperature=0.0, max_tokens=MAX_PLAN_TOKENS, stop_token_ids=[mask.end], ignore_eos=True)
        done = asker.llm.generate({"prompt_token_ids": ids}, params, token_mask=mask)[0]
        out.append((ids + done.token_ids, len(ids)))
    return out


def test_mtp_drafts_far_better_than_chance(asker: Asker, model: Transformer) -> None:
    """The MTP block, given a plan's token, guesses the one after it."""
    hits = guesses = 0
    for ids, begin in plans(asker, 24):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            streams = model.streams(tokens[:, :-1])
            logits, _ = model.draft(tokens[:, 1:], streams)
        # logits[t] guesses ids[t + 2]; plan tokens from the second on
        for t in range(begin - 1, len(ids) - 2):
            hits += int(logits[t].argmax()) == ids[t + 2]
            guesses += 1
    assert guesses > 80
    assert hits / guesses > 0.4  # chance is 1 in 4096; the most common plan token is under 0.25


def test_held_out_questions() -> None:
    """On questions and tables that training never saw (benchmarks/questions): right where the keyword-rules control
    isn't, and right when it is sure."""
    questions = judge.load_questions()
    nano = judge.summarize(list(judge.Judge().verdicts(questions, predictors.nano)))
    rules = judge.summarize(list(judge.Judge().verdicts(questions, predictors.rules)))
    assert nano["precision_sure"]["rate"] >= 0.90
    assert nano["precision_sure"]["rate"] >= rules["precision_sure"]["rate"] + 0.10
    assert nano["coverage_sure"]["rate"] >= 0.30
    assert nano["accuracy"]["rate"] >= max(0.70, rules["accuracy"]["rate"] + 0.08)
