"""upwell eval: loss as transformers has it, distances by torch's own, intervals by hand, errors in one line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import tiny_v4
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from upwell import LLM, load_model
from upwell.analyst.ask import Asker
from upwell.bench.documents import Cut, Document
from upwell.bench.evaluate import Evaluation, describe, evaluate
from upwell.bench.quality import Scores, loss_difference, paired_difference, predict, score
from upwell.bench.questions import load_judge, right_answers
from upwell.checkpoint.convert import Conversion, convert
from upwell.cli import main
from upwell.engine.llm import nano_path
from upwell.nano.heldout import write_prompts
from upwell.ops import native

TEXT = "The quick brown fox jumps over the lazy dog; 0.5 % of 1,234 dogs don't mind. " * 5
QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "questions"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_v4.save_transformers(path)
    tiny_v4.build_tokenizer().save(str(path / "tokenizer.json"))
    return path


def test_loss_is_transformers_with_the_same_windows(tiny: Path, tmp_path: Path) -> None:
    from transformers import DeepseekV4ForCausalLM

    theirs = DeepseekV4ForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    (tmp_path / "text.txt").write_text(TEXT)
    ids = [byte_id + 2 for byte_id in _bytes_in_order(TEXT)]
    for window, stride in ((512, 256), (128, 48)):
        row = evaluate(Evaluation([tiny], data=tmp_path / "text.txt", window=window, stride=stride))[0]
        losses, before = [], 0
        for first in range(0, len(ids), stride):
            part = torch.tensor([[0, *ids[first : first + window - 1]]])
            labels = part.clone()
            labels[:, : 1 + before - first] = -100  # what windows before it have scored, and the first token
            with torch.no_grad():
                mean = theirs(part, labels=labels).loss
            count = int((labels[:, 1:] != -100).sum())
            losses.append((float(mean) * count, count))
            before = first + part.shape[1] - 1
            if before >= len(ids):
                break
        expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        assert sum(count for _, count in losses) == row["tokens"] == len(ids)
        assert row["loss"] == pytest.approx(expected, abs=2e-4)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))


def _bytes_in_order(text: str) -> list[int]:
    """Byte-level ids without our tokenizer: the alphabet's place of each byte's character."""
    from tokenizers.pre_tokenizers import ByteLevel

    place = {char: k for k, char in enumerate(sorted(ByteLevel.alphabet()))}
    return [place["Ġ" if char == " " else char] for char in text]


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    text = list(range(100, 100 + n))
    scored: list[int] = []
    for k, document in enumerate(Cut(0, window, stride).text(text)):
        assert document.ids[0] == 0 and len(document.ids) <= window
        assert document.ids[1:] == text[k * stride : k * stride + window - 1]
        assert k == 0 or document.begin >= window - stride
        scored += document.ids[document.begin :]
    assert scored == text


def test_divergence_and_agreement() -> None:
    ours, other = tiny_v4.build_model(0), tiny_v4.build_model(1)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 258, (3, 40), generator=generator).tolist()
    documents = [Document(ids[0], 1), Document(ids[1], 30, True), Document(ids[2][:25], 24, True)]
    reference = predict(ours, documents)
    assert score(reference, documents, reference).summary()["kl"] == pytest.approx(0, abs=1e-6)
    scores = score(predict(other, documents), documents, reference)
    kl, same, n = 0.0, 0, 0
    for document in documents:
        with torch.no_grad():
            p, q = (m(torch.tensor([document.ids]))[0, document.begin - 1 : -1].log_softmax(-1) for m in (ours, other))
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        n += len(p)
    summary = scores.summary()
    assert summary["tokens"] == n == 39 + 10 + 1 and summary["completions"] == 2
    assert summary["kl"] == pytest.approx(kl / n, rel=1e-3) and summary["same_first_choice"] == same / n


def test_a_completion_is_right_as_a_whole() -> None:
    model = tiny_v4.build_model()
    ids = [0, 5, 6]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    wrong = [*ids[:5], (ids[5] + 1) % 300, ids[6]]
    documents = [Document(ids, 3, True), Document(wrong, 3, True), Document(ids, 1)]
    assert score(predict(model, documents), documents).whole.tolist() == [True, False]


def test_intervals_of_differences() -> None:
    # By hand: n = 10, 1 gained, 3 lost; (2 - 4) / 12 -+ 1.96 sqrt((6 / 12 - (2 / 12)^2) / 12).
    pair = paired_difference([True] * 5 + [True] + [False] * 3 + [False], [True] * 5 + [False] + [True] * 3 + [False])
    assert (pair["gained"], pair["lost"], pair["difference"]) == (1, 3, -0.2)
    assert (pair["low"], pair["high"]) == (pytest.approx(-0.5555, abs=1e-4), pytest.approx(0.2221, abs=1e-4))
    assert paired_difference([True], [True])["difference"] == 0
    none = torch.zeros(3, dtype=torch.float64)
    tokens = torch.tensor([10.0, 10.0, 10.0], dtype=torch.float64)
    losses = torch.tensor([[3.0, 6.0, 9.0], [2.0, 4.0, 6.0]]).double()
    a, b = (Scores(tokens, loss, none, none.bool()) for loss in losses)
    # Of equal documents it is the mean of 0.1, 0.2, 0.3 with its standard error 0.1 / sqrt(3).
    found = loss_difference(a, b)
    assert found["difference"] == pytest.approx(0.2)
    assert found["low"] is not None and found["high"] is not None
    assert found["high"] - found["low"] == pytest.approx(2 * 1.959964 * 0.1 / math.sqrt(3))


@pytest.fixture(scope="module")
def integer_nanos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nanos")
    convert(Conversion(nano_path(), made / "w8a8", "w8a8"))
    convert(Conversion(nano_path(), made / "w4a8", "w4a8"))
    return made


def test_nano_in_integers_is_near_nano(integer_nanos: Path) -> None:
    write_prompts(integer_nanos / "plans.jsonl", 16)
    models = [integer_nanos / "w8a8", integer_nanos / "w4a8"]
    before, *after = evaluate(Evaluation(models, nano_path(), integer_nanos / "plans.jsonl"))
    assert (before["format"], *(row["format"] for row in after)) == ("official", "w8a8", "w4a8")
    assert before["tokens"] > 80 and before["completions"] == 16
    for row, most in zip(after, (0.002, 0.02), strict=True):
        assert 0 < row["kl"] < most and row["same_first_choice"] > 0.96
        assert abs(row["completions_difference"]["difference"]) <= 2 / 16
        assert row["loss"] == pytest.approx(before["loss"], abs=0.02)


@pytest.mark.skipif(native.library() is None, reason="such a cache is the kernels'; none are built here")
def test_a_cache_in_int8_is_held_against_the_models_own(tmp_path: Path) -> None:
    write_prompts(tmp_path / "plans.jsonl", 16)
    job = Evaluation([nano_path()], nano_path(), tmp_path / "plans.jsonl", kv_cache_dtype=torch.int8)
    before, after = evaluate(job)
    assert "kv_cache_dtype" not in before and after["kv_cache_dtype"] == "int8"
    assert 0 < after["kl"] < 0.002 and after["same_first_choice"] > 0.96
    assert "official, KV int8" in describe([before, after])


def test_questions_are_answered_as_one_by_one() -> None:
    judge = load_judge(QUESTIONS)
    questions = judge.load_questions()[:4]
    llm = LLM()
    asker, bench = Asker(llm), judge.Judge()
    alone = []
    for question in questions:
        asker.open(bench.path(question.table))
        answer = asker.ask(question.question)
        alone.append(bench.right(question, answer.status, answer.sql))
    assert right_answers(judge, llm.model, llm.tokenizer, questions) == alone


def test_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": TEXT[:80]}) + "\n" + json.dumps({"prompt": "2 + 2 =", "completion": " 4"}))
    assert main(["eval", str(tiny), "--against", str(tiny), "--data", str(data), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["benchmark"] == "eval" and len(record["rows"]) == 2
    assert record["rows"][0]["tokens"] == 82 and record["rows"][1]["loss_difference"]["difference"] == 0
    assert main(["eval", str(tiny), "--against", str(tiny), "--data", str(data)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and "perplexity" in table[0] and "100.0 %" in table[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure on"),
        (["--data", "none.txt"], "no such file"),
        (["--data", "{tmp}/x.pdf"], "ends in .pdf"),
        (["--data", "{tmp}/bad.jsonl"], "bad.jsonl:2: isn't JSON"),
        (["--data", "{tmp}/keys.jsonl"], 'keys.jsonl:1: isn\'t {"text"'),
        (["--data", "{tmp}/empty.txt"], "holds nothing to score"),
        (["--data", "{tmp}/latin.txt"], "isn't UTF-8"),
        (["--data", "{tmp}/ok.txt", "--window", "1"], "--window is 1"),
        (["--data", "{tmp}/ok.txt", "--window", "9999999"], "is 9999999, the model takes"),
        (["--data", "{tmp}/ok.txt", "--stride", "2048"], "--stride is 2048"),
        (["--questions", "{tmp}"], "has no judge.py"),
        (["--data", "{tmp}/ok.txt", "--against", "{tmp}/none"], "no such directory"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {
        "x.pdf": b"", "bad.jsonl": b'{"text": "a"}\n{"text', "keys.jsonl": b'{"prompt": "a"}', "empty.txt": b"",
        "latin.txt": b"caf\xe9", "ok.txt": b"some text",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert main(["eval", str(tiny), *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    said_in_all = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upwell:")]
    assert len(said_in_all) == 1 and said in said_in_all[0]


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(QUESTIONS.parent)


def test_formats_benchmark_knows_every_format(benchmark_modules: None) -> None:
    import formats

    from upwell.checkpoint.recipes import RECIPES, TARGETS

    named = {flags[1] for flags in formats.FORMATS.values()}
    assert {"bf16", "fp8", "w8a8", "w4a8", "w4a16"} == named <= set(TARGETS)
    assert set(RECIPES) <= {flag for flags in formats.FORMATS.values() for flag in flags}


def test_formats_benchmark_goes_on_where_it_was_stopped(
    benchmark_modules: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import formats

    measured: list[list[str]] = []

    def evaluate(source: Path, models: list[Path], data: Path, questions: bool) -> dict[str, object]:
        names = [model.name for model in models]
        measured.append(names)
        if "fp8" in names and len(measured) == 2:
            raise KeyboardInterrupt
        return {"rows": [{"model": name, "run": len(measured)} for name in (source.name, *names)]}

    monkeypatch.setattr(formats, "convert", lambda source, work, name: work / name)
    monkeypatch.setattr(formats, "evaluate", evaluate)
    monkeypatch.setattr(formats, "write_prompts", lambda *_, **__: None)
    monkeypatch.setattr(formats, "describe", str)
    record = tmp_path / "formats.json"
    asked = ["w4a8-plain", "w8a8-upwell", "w4a16-plain", "fp8"]
    monkeypatch.setattr(sys, "argv", ["formats.py", "--formats", *asked, "--json", str(record)])
    with pytest.raises(KeyboardInterrupt):
        formats.main()
    assert not record.exists()
    formats.main()
    assert measured == [asked[:3], asked[3:], asked[3:]]
    rows = json.loads(record.read_text())["rows"]
    assert [(row["model"], row["run"]) for row in rows[1:]] == [*((name, 1) for name in asked[:3]), ("fp8", 3)]
    assert [file.name for file in tmp_path.iterdir()] == ["formats.json"]


def test_plans_are_read_whole_or_by_their_completion(benchmark_modules: None) -> None:
    import plans

    whole, completions = plans.read_plans(nano_path(), 3, whole=True), plans.read_plans(nano_path(), 3)
    for of_all, of_plan in zip(whole, completions, strict=True):
        assert of_all.begin == 1 and not of_all.completion and of_plan.completion
        assert of_all.ids[: of_plan.begin] == of_plan.ids[: of_plan.begin] and of_plan.begin > 20


def test_ratio_of_divergences_has_its_interval(benchmark_modules: None) -> None:
    import plans

    def scores(kl: torch.Tensor) -> Scores:
        return Scores(torch.ones(len(kl)), kl, kl, torch.empty(0), kl.double(), kl)

    generator = torch.Generator().manual_seed(0)
    other = torch.rand(400, generator=generator)
    model = other * (0.5 + 0.2 * torch.randn(400, generator=generator))
    found = plans.kl_ratio(scores(model), scores(other))
    expected = float(model.sum() / other.sum())
    # The ratio's spread by the delta method.
    spread = float((model - expected * other).std() / other.mean() / 400**0.5)
    assert found["ratio"] == pytest.approx(expected, rel=1e-6)
    assert found["low"] == pytest.approx(expected - 1.96 * spread, abs=0.2 * spread)
    assert found["high"] == pytest.approx(expected + 1.96 * spread, abs=0.2 * spread)


def test_other_tokenizers_are_refused(tiny: Path) -> None:
    from upwell.errors import InputError

    data = tiny / "some.txt"
    data.write_text("some text")
    with pytest.raises(InputError, match="tokenizer isn't that of"):
        evaluate(Evaluation([nano_path()], tiny, data))
    assert load_model(tiny).config.bos_token_id == 0
