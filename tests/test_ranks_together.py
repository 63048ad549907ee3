"""Units on ranks beside all else that a step may be: the bits of one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.unit import Activations, Unit
from layerwise.losses import Evaluated, Targets
from layerwise.runs.folder import SEPARABILITY, RunFolder
from layerwise.utils.options import Options
from tests.helpers import digits, ticks
from tests.ranks import on_ranks
from tests.test_ranks_train import RUN, carry_out, digests, records
from tests.test_replicas import COMBINATIONS, OPTIMIZERS, local, numbers, scales

BORDER = 1  # the first unit of the second rank, of two


def learners(count: int, **options: Any) -> list[layerwise.Learner]:
    options = {"name": "plain", "dtype": torch.float32, "optimizer": OPTIMIZERS["adam"]} | options
    return [local(**options) for _ in range(count)]


def combined(parts: int, amp: torch.dtype | None, clip_grad: float | None) -> bool:
    """Whether an epoch on ranks gives the bits of one process."""
    shared, alone = learners(2, amp=amp, clip_grad=clip_grad)
    layerwise.distribute(shared)
    data = digits(44).train
    made = ticks("parallel", shared, data, epochs=1, micro_batches=parts)
    own = shared.stage.own
    with layerwise.whole(shared) as first:
        expected = ticks("simultaneous", alone, data, epochs=1, micro_batches=parts)
        losses = [
            [tick.result.losses[own.start : own.stop] for tick in each] for each in (made, expected)
        ]
        return losses[0] == losses[1] and (not first or same_bits(shared, alone))


def same_bits(one: layerwise.Learner, other: layerwise.Learner) -> bool:
    pairs = zip(numbers(one), numbers(other), strict=True)
    return scales(one) == scales(other) and all(torch.equal(*pair) for pair in pairs)


def all_combined() -> list[bool]:
    return [combined(*combination) for combination in COMBINATIONS]


class Rounding:
    """The step of a unit that reads everything of float32 as if it had travelled as bfloat16."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __call__(
        self, activations: Activations, targets: Targets, *rest: Any
    ) -> tuple[Activations, Evaluated]:
        images = None if targets.images is None else rounded(targets.images)
        targets = replace(targets, images=images)
        return Unit.step(self.unit, tuple(map(rounded, activations)), targets, *rest)


def rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


def all_rounded() -> list[tuple[bool, bool]]:
    """By losses that read features alone and images too: whether rounding where ranks meet is all
    that changes, and whether it changes something.
    """
    return [rounded_on_ranks(loss) for loss in ("predsim", "infopro")]


def rounded_on_ranks(loss: str) -> tuple[bool, bool]:
    shared, alone, exact = learners(3, loss=loss)
    layerwise.distribute(shared, bfloat16_features=True)
    alone.units[BORDER].step = Rounding(alone.units[BORDER])  # type: ignore[method-assign, assignment]
    ticks("parallel", shared, digits(44).train, epochs=1)
    with layerwise.whole(shared) as first:
        for learner in (alone, exact) if first else ():
            ticks("simultaneous", learner, digits(44).train, epochs=1)
        return not first or same_bits(shared, alone), not first or not same_bits(shared, exact)


WATCHED = replace(
    RUN, amp=True, clip_grad=0.05, epochs=2, rule_options=Options({"micro_batches": 2})
)
MEASURED = {"separability_every": 1, "separability_measures": "nearest_class_mean,fisher"}


def watched(path: Path) -> dict[str, Any]:
    return carry_out(WATCHED, path, **MEASURED)


def all_tasks(path: Path) -> dict[str, Any]:
    tasks = (all_combined, all_rounded)
    return {task.__name__: task() for task in tasks} | {"result": watched(path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks") / "run"


@pytest.fixture(scope="module")
def on_both(folder: Path) -> list[dict[str, Any]]:
    """What all tasks return on each of two ranks, which are started once."""
    results = on_ranks(all_tasks, folder)
    assert all(isinstance(result, dict) for result in results), results
    return results


def test_parts_mixed_precision_and_clipping_give_the_bits_of_one_process(on_both: Any) -> None:
    for results in on_both:
        pairs = zip(COMBINATIONS, results["all_combined"], strict=True)
        assert [combination for combination, same in pairs if not same] == []


def test_features_of_bfloat16_are_rounded_where_ranks_meet_and_nothing_else(on_both: Any) -> None:
    for results in on_both:
        assert results["all_rounded"] == [(True, True)] * 2


def test_separability_is_that_of_one_process(on_both: Any, folder: Path, tmp_path: Path) -> None:
    """In a run of batches in parts, in mixed precision and clipped, whose files are alike too."""
    expected = watched(tmp_path / "alone")
    lines = [
        RunFolder(path).file(SEPARABILITY).read_text() for path in (folder, tmp_path / "alone")
    ]
    assert lines[0] == lines[1]
    assert lines[0].count("nearest_class_mean") >= 2
    assert digests(folder) == digests(tmp_path / "alone")
    assert records(folder) == records(tmp_path / "alone")
    assert on_both[0]["result"]["test_accuracy"] == expected["test_accuracy"]
