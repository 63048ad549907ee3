"""Units planned by a budget of memory: the fewest that fit, as predicted and as measured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.cli import main
from layerwise.core.learner import Learner
from layerwise.core.split import cut_paths, split
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.memory.accounting import measured, persistent_bytes
from layerwise.profiling.budget import cuts_by_count, plan_run, search
from layerwise.profiling.profile import predict_peak
from layerwise.profiling.trial_steps import trial_images
from layerwise.runs.run import Execution, Run
from tests import helpers
from tests.helpers import CLASSES
from tests.test_cli import last_json, refusal

BATCH = 32
SAMPLE = torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(BATCH) % CLASSES
LIMIT = 700_000  # bytes; one unit takes 0.90 MB, and five 0.66 MB


def planned(limit: int, **options: Any) -> Learner:
    model = helpers.network("resnet18")
    return layerwise.localize(
        model, SAMPLE, CLASSES, "pred", f"memory:{limit}B", seed=0, check=False, **options
    )


def test_the_fewest_units_that_fit() -> None:
    torch.manual_seed(0)
    local = planned(LIMIT)
    drawn, plan = torch.rand(1), local.plan
    assert plan.units == len(local.units) > 1
    assert f"{plan.units} units, predicted peak" in repr(local)
    cuts = cuts_by_count(local.model, "block", SAMPLE[:2], BATCH, CLASSES, output_layer="joined")
    assert cuts[plan.units - 1] == plan.at
    fewer = predict_peak(
        local.model, tuple(SAMPLE.shape), CLASSES, loss="pred", at=cuts[plan.units - 2]
    )
    assert plan.predicted_peak_bytes <= LIMIT < fewer
    # planning has drawn nothing and changed no weight
    torch.manual_seed(0)
    model = helpers.network("resnet18")
    named = layerwise.localize(model, SAMPLE, CLASSES, "pred", plan.at, seed=0, check=False)
    assert torch.equal(drawn, torch.rand(1))
    assert helpers.same_weights(local.model, named.model)
    assert named.plan is None


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="known of processors with AVX-512 only",
)
def test_a_planned_step_takes_no_more_memory_than_was_allowed() -> None:
    local = planned(LIMIT)
    local.step(SAMPLE, LABELS)
    before = persistent_bytes(local)
    with measured(torch.device("cpu")) as step:
        local.step(SAMPLE.clone(), LABELS)
    assert before + step.transient_bytes <= LIMIT


def test_ample_memory_is_global_training() -> None:
    assert planned(10**9).plan.at == 1
    assert planned(10**9, span=2).plan.units == 2  # a window needs as many units


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("memory:10kB", r"lowest peak that is predicted is .* smaller batch"),
        ("memory:much", "size"),
    ],
)
def test_budgets_that_cannot_be_satisfied_are_refused(size: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        layerwise.localize(helpers.network("plain"), SAMPLE, CLASSES, "pred", size)
    with pytest.raises(CannotSplit, match=r"layerwise\.localize"):
        split(helpers.network("plain"), size)


def test_the_budget_that_a_refusal_asks_for_suffices() -> None:
    with pytest.raises(InvalidInput) as refused:
        layerwise.localize(helpers.network("plain"), SAMPLE, CLASSES, "pred", "memory:10kB")
    [asked] = re.findall(r"predicted is ([\d.]+ [kM]B)", str(refused.value))
    again = layerwise.localize(helpers.network("plain"), SAMPLE, CLASSES, "pred", f"memory:{asked}")
    assert again.plan is not None


@pytest.mark.parametrize("rule", ["global", "checkpointed"])
def test_a_rule_of_one_unit_keeps_to_a_budget_or_is_refused(rule: str) -> None:
    given = Run("vgg8", rule=rule, width=0.0625, at="memory:1kB", batch_size=16)
    with pytest.raises(InvalidInput, match=f"the rule {rule} trains the network as one unit"):
        plan_run(given, Execution(device="cpu"))
    assert plan_run(replace(given, at="memory:4GB"), Execution(device="cpu"))[0].at == "1"
    assert plan_run(given, Execution(device="cpu"), reference=True)[0].at == "1"


def test_a_run_on_a_gpu_is_planned_for_one() -> None:
    given = Run("vgg8", width=0.0625, at="memory:4GB", batch_size=16, loss="pred")
    peaks = {}
    for device in ("cpu", "cuda"):
        _, plan = plan_run(given, Execution(device=device), trial_images(given, CLASSES))
        assert plan is not None
        peaks[device] = plan.predicted_peak_bytes
        model = layerwise.create_model("vgg8", num_classes=CLASSES, width=0.0625)
        # as the program sets it
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        whole = (16, 3, 32, 32)
        assert peaks[device] == predict_peak(
            model, whole, CLASSES, loss="pred", at=1, device=device
        )
    assert peaks["cpu"] != peaks["cuda"]


def as_it_is(peak: Any) -> int:
    number: int = peak
    return number


def test_search_finds_a_valley() -> None:
    """Peaks fall and, as heads outweigh that, rise again."""
    peaks: Any = [90, 80, 70, 60, 50, 40, 45, 50, 55, 60]
    for limit, count in ((95, 1), (60, 4), (40, 6)):
        tried = search(peaks, as_it_is, limit)
        assert min(n for n, peak in tried.items() if peak <= limit) == count
    assert min(search(peaks, as_it_is, 30).values()) == 40
    # some that fit are tried before the lowest
    falling: Any = [
        *range(500, 320, -10),
        320,
        290,
        280,
        270,
        265,
        260,
        261,
        262,
        263,
        301,
        330,
        340,
    ]
    assert min(n for n, peak in search(falling, as_it_is, 300).items() if peak <= 300) == 20


@pytest.mark.parametrize("at", ["block", "layer"])
@pytest.mark.parametrize("name", ["resnet18", "vgg8b", "plain"])
def test_paths_cut_as_their_cuts_do(name: str, at: str) -> None:
    model = helpers.network(name)
    paths = cut_paths(model, at, SAMPLE[:2], output_layer="joined")
    chain = split(model, at, SAMPLE[:2], output_layer="joined")
    assert split(model, paths, SAMPLE[:2]).names == chain.names


SMALL = "--width 0.0625 --train-images 80 --batch-size 32"
RUN = f"resnet18 --hierarchy 1,1,1,1 --loss pred {SMALL}"


def test_a_run_records_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *RUN.split(), "--epochs", "1", "--device", "cpu", "--at", "memory:700kB"]
    folder = tmp_path / "run"
    main([*words, "--output", str(folder), "--json"])
    out = capsys.readouterr().out
    result = json.loads(out.strip().splitlines()[-1])
    assert f"700 kB of memory: {len(result['units'])} units" in out
    assert result["plan"]["predicted_peak_bytes"] <= 700_000
    assert result["peak_memory_bytes"] <= 700_000
    described = json.loads((folder / "run.json").read_text())
    assert described["run"]["at"] == ",".join(result["plan"]["at"])
    main([*words, "--output", str(folder), "--resume"])
    capsys.readouterr()
    assert "train, audit or compare" in refusal(
        capsys, "show", *RUN.split()[:5], "--at", "memory:1MB"
    )


def test_audit_and_compare_plan_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", *RUN.split()[:7], "--batch-size", "8", "--at", "memory:4MB", "--json"])
    assert last_json(capsys)["problem"] is None
    main(["compare", "resnet18", "--hierarchies", "1,1,1,1", *SMALL.split(), "--epochs", "1",
          "--device", "cpu", "--at", "memory:700kB", "--losses", "pred", "--output",
          str(tmp_path), "--json"])  # fmt: skip
    whole, local = last_json(capsys)["rows"]
    assert whole["units"] == 1 < local["units"]
    assert local["peak_memory_bytes"] <= 700_000
