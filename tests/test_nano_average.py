"""The mean of a run's kept weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from upwell.errors import InputError
from upwell.nano.average import average


def test_mean_of_kept_steps(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    for step, value in ((200, 1.0), (400, 2.0), (800, 6.0)):
        model = {"w": torch.full((2, 3), value), "table": torch.tensor([step])}
        torch.save({"model": model}, tmp_path / "steps" / f"{step}.pt")
    mean = average(tmp_path, [200, 400, 800])
    torch.testing.assert_close(mean["w"], torch.full((2, 3), 3.0))
    assert mean["table"].tolist() == [800]


def test_a_step_that_was_not_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step 600"):
        average(tmp_path, [600])
