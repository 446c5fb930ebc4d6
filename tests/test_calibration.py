"""Rounding for given inputs: GPTQ against rounding to nearest, what is recorded, and conversions with --calibration."""

from __future__ import annotations

from pathlib import Path

import conversions
import pytest
import torch
from torch import Tensor

from upwell import load_model
from upwell.checkpoint import calibrate as module
from upwell.checkpoint.calibrate import Calibration, calibrate, first_tokens, rounded_for
from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.rounding import gptq, search_scale
from upwell.checkpoint.verify import verify
from upwell.cli import main
from upwell.errors import InputError
from upwell.formats.int4 import int4_scale, round_to_int4


def correlated(n: int, dim: int, seed: int) -> Tensor:
    """Inputs as models have them: some directions and some columns are large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, dim, generator=torch.Generator().manual_seed(1))
    columns = 1 + 4 * (torch.arange(dim) % 16 == 0)
    noise = torch.randn(n, dim, generator=generator)
    return (torch.randn(n, 12, generator=generator) @ mixing + 0.5 * noise) * columns


def output_error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    rounded = (codes.float().view(len(weight), scale[0].numel(), -1) * scale.view(len(weight), -1, 1)).view_as(weight)
    return float((x @ (rounded - weight).T).square().mean() / (x @ weight.T).square().mean())


@pytest.mark.parametrize("group", [None, 32])
def test_gptq_halves_the_error_on_inputs_it_never_saw(group: int | None) -> None:
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
    seen, unseen = correlated(2000, 160, 2), correlated(500, 160, 3)
    nearest = int4_scale(weight, group)
    plain = output_error(unseen, weight, round_to_int4(weight, nearest), nearest)
    codes, scale = rounded_for(seen, weight, group)
    assert output_error(unseen, weight, codes, scale) < 0.5 * plain
    assert codes.dtype == torch.int8 and codes.abs().max() <= 7
    assert scale.shape == ((48,) if group is None else (48, 5))
    assert group is None or torch.equal(scale, scale.bfloat16().float())
    # The compensation alone, at the same scale.
    uncompensated = round_to_int4(weight, scale)
    assert output_error(unseen, weight, codes, scale) < output_error(unseen, weight, uncompensated, scale)


def test_gptq_without_correlation_rounds_to_nearest() -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    scale = int4_scale(weight)
    assert torch.equal(gptq(weight, scale, torch.eye(300), 7), round_to_int4(weight, scale))


def test_scale_search_is_never_worse_and_heeds_importance() -> None:
    weight = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 5] *= 6
    importance = torch.ones(64)
    importance[5] = 1e-6  # the large column hardly counts: it may be cut off
    errors = {}
    for name, scale in {"full": int4_scale(weight), "found": search_scale(weight, 7, None, importance)}.items():
        errors[name] = ((round_to_int4(weight, scale) * scale[:, None] - weight).square() * importance).sum(1)
    assert (errors["found"] <= errors["full"] * 1.0001).all() and errors["found"].sum() < 0.6 * errors["full"].sum()
    assert torch.equal(search_scale(torch.zeros(2, 4), 7), torch.full((2,), 1 / 7))


def texts(count: int = 24, length: int = 60, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(2, 300, (length,), generator=generator).tolist()] for _ in range(count)]


def test_recorded_inputs_are_those_of_the_whole_model(official: Path, tmp_path: Path) -> None:
    some = texts(3)
    layers: list[tuple[int, int]] = []
    calibrate(official, first_tokens(some, 300), tmp_path / "kept", lambda done, total: layers.append((done, total)))
    assert layers == [(k, 4) for k in range(1, 5)] and not (tmp_path / "kept" / "streams").exists()
    model = load_model(official)
    for name, ffn in (("layers.2", model.layers[2].ffn), ("mtp.0", model.mtp[0].ffn)):
        seen: list[tuple[Tensor, Tensor]] = []
        hook = ffn.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments))
        with torch.no_grad():
            for ids in some:
                streams = model.streams(torch.tensor([ids]))
                if name == "mtp.0":
                    model.draft_streams(torch.tensor([ids[1:]]), streams[:-1])
        hook.remove()
        x, ids = (torch.cat(parts) for parts in zip(*seen, strict=True))
        experts, weights = ffn.gate(x, ids)
        for e in range(conversions.CONFIG.n_routed_experts):
            rows, shares = Calibration(tmp_path / "kept", 10.0).inputs(f"{name}.ffn.experts", e)
            token, place = (experts == e).nonzero(as_tuple=True)
            torch.testing.assert_close(rows, x[token].float(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(shares, weights[token, place], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("to", ["w4a8", "w4a16"])
def test_calibrated_is_nearer_to_the_source_and_runs(official: Path, tmp_path: Path, to: str) -> None:
    convert(Conversion(official, tmp_path / "plain", to))  # type: ignore[arg-type]
    convert(Conversion(official, tmp_path / "calibrated", to, calibration=texts()))  # type: ignore[arg-type]
    assert not (tmp_path / "calibrated" / ".calibration").exists() and verify(tmp_path / "calibrated") > 2
    source, plain, ours = (
        conversions.dense(load_model(path, dtype=torch.float32))
        for path in (official, tmp_path / "plain", tmp_path / "calibrated")
    )
    x = torch.cat([_inputs(official, tmp_path / "x", layer) for layer in (1, 2)])
    worse = better = 0.0
    for name, weight in source.items():
        if ".experts." in name and name.endswith((".w1", ".w3")):
            worse += float((x @ (plain[name] - weight).T).square().sum())
            better += float((x @ (ours[name] - weight).T).square().sum())
        elif ".experts." not in name:
            assert torch.equal(plain[name], ours[name])
    assert better < 0.9 * worse
    with torch.no_grad():
        assert load_model(tmp_path / "calibrated", dtype=torch.float32)(torch.tensor([[0, 5, 9]])).isfinite().all()


def _inputs(official: Path, directory: Path, layer: int) -> Tensor:
    """The experts' inputs of a layer, of texts that calibration didn't see."""
    calibrate(official, first_tokens(texts(seed=6), 300), directory, lambda done, total: None)
    kept = torch.load(directory / f"layers.{layer}.ffn.experts.pt", weights_only=True)
    return kept["x"].float()


def test_experts_with_few_tokens_are_rounded_without_them(official: Path, tmp_path: Path) -> None:
    calibrate(official, first_tokens(texts(1, 8), 300), tmp_path / "kept", lambda done, total: None)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = Calibration(tmp_path / "kept", 10.0).round_to_int4(
        "layers.1.ffn.experts", 0, "w2", lambda: pytest.fail("not needed"), weight, None
    )
    assert torch.equal(scale, search_scale(weight, 7)) and torch.equal(codes, round_to_int4(weight, scale))


@pytest.mark.parametrize("stop_at", ["layer", "shard"])
def test_stopped_calibration_goes_on_and_ends_with_the_same_bytes(official: Path, tmp_path: Path, stop_at: str) -> None:
    def job(name: str) -> Conversion:
        return Conversion(official, tmp_path / name, "w4a8", shards=3, calibration=texts(6))

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    convert(job("whole"))
    with pytest.raises(KeyboardInterrupt):
        convert(job("again"), **{"calibrating" if stop_at == "layer" else "progress": stop})
    assert (tmp_path / "again" / ".calibration").is_dir()
    with pytest.raises(InputError, match="another conversion stopped here"):
        convert(Conversion(official, tmp_path / "again", "w4a8", shards=3, calibration=texts(5)))
    convert(job("again"))
    whole, again = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("whole", "again"))
    assert whole == again


def test_what_cannot_be_calibrated_is_refused(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="for w4a8 and w4a16"):
        convert(Conversion(official, tmp_path / "out", "w8a8", calibration=texts()))
    with pytest.raises(InputError, match="text is empty"):
        convert(Conversion(official, tmp_path / "out", "w4a8", calibration=[]))
    with pytest.raises(InputError, match="vocabulary of 300"):
        convert(Conversion(official, tmp_path / "out", "w4a8", calibration=[[0, 300]]))
    convert(Conversion(official, tmp_path / "bf16", "bf16"))
    monkeypatch.setattr("upwell.checkpoint.convert.MOST_HELD", 1000)
    arguments = ["convert", str(tmp_path / "bf16"), str(tmp_path / "out3"), "--to", "w4a8", "--calibration"]
    (tmp_path / "text.txt").write_text("some text")
    assert main([*arguments, str(tmp_path / "text.txt")]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    from upwell.errors import CheckpointError

    with pytest.raises(CheckpointError, match="dense weights in memory"):
        convert(Conversion(tmp_path / "bf16", tmp_path / "out3", "w4a8", calibration=texts()))
    assert module.MOST_TOKENS * 7168 * 2 < 1 << 29  # a layer's inputs of Pro, in memory while it runs
