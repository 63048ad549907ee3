"""The memory of a GPU that is not there: predicted, and kept to a limit by streams and by plans."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from layerwise.cli import main
from layerwise.errors import InvalidInput
from layerwise.memory import cuda
from layerwise.memory.streams import StepBytes, StepChoice, choose_streams, step_bytes
from layerwise.ops import batch_norm, spatial_std
from layerwise.ops.batch_norm import NormalisedActivation
from layerwise.profiling.predict import predict_steps
from layerwise.profiling.profile import predict_peak
from layerwise.rules import RULES
from layerwise.rules.checkpoint_plan import Joint, Plan, beyond, least_work
from layerwise.utils.device import counting_for, device_kind
from tests.helpers import digits, learner, narrow, same_weights, ticks

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
CONVOLUTION = torch.ops.aten.convolution.default
BACKWARD = torch.ops.aten.convolution_backward.default
MAPS, OUTPUT, WEIGHT = (2, 3, 8, 8), (2, 16, 8, 8), (16, 3, 3, 3)


def backward_arguments(
    gradient: torch.Tensor, maps: torch.Tensor, weight: torch.Tensor, mask: list[bool]
) -> list[object]:
    return [gradient, maps, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask]


def test_the_allocator_counts_whole_blocks() -> None:
    assert [cuda.block_bytes(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_contiguous_maps_are_copied_and_channels_last_are_not() -> None:
    maps, weight, output = (torch.zeros(shape) for shape in (MAPS, WEIGHT, OUTPUT))
    # three channels of float32 fill a pixel's 16 bytes as four do
    of_maps, of_weight, of_output = 2 * 64 * 16, 16 * 9 * 16, output.nbytes
    arguments = [maps, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1]
    forward = cuda.workspace_bytes(CONVOLUTION, arguments, output)
    assert forward == output.nbytes + of_maps + of_weight + of_output
    for mask, needed in (
        ([False, True, False], weight.nbytes + of_maps + of_weight + of_output),
        ([True, False, False], maps.nbytes + of_maps + of_weight + of_output),
        ([True, True, False], maps.nbytes + weight.nbytes + of_maps + of_weight + of_output),
    ):
        given = backward_arguments(output, maps, weight, mask)
        assert cuda.workspace_bytes(BACKWARD, given, None) == needed
    arguments[0] = maps.contiguous(memory_format=torch.channels_last)
    assert cuda.workspace_bytes(CONVOLUTION, arguments, output) == 0
    assert cuda.workspace_bytes(torch.ops.aten.relu.default, [maps], maps) == 0


def test_grouped_convolutions_are_not_copied() -> None:
    maps, weight = torch.zeros(2, 16, 8, 8), torch.zeros(16, 1, 3, 3)
    assert cuda.workspace_bytes(CONVOLUTION, [maps, weight], maps) == 0


def test_a_gpu_is_predicted_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(device: str) -> int:
        return predict_peak(narrow("vgg8b"), (16, 1, 8, 8), 10, device=device, loss="pred")

    on_cpu, on_gpu, copied = peak("cpu"), peak("cuda"), 10**8
    # whole blocks on one, a second map of batch normalisation on the other
    assert 0 < abs(on_gpu - on_cpu) < 10**5
    monkeypatch.setattr(cuda, "workspace_bytes", lambda *call: copied)
    assert peak("cpu") == on_cpu
    assert copied < peak("cuda") < copied + on_gpu
    assert device_kind(torch.zeros(1)) == "cpu"


def test_another_device_is_refused() -> None:
    with pytest.raises(InvalidInput, match="device"):
        predict_peak(narrow("vgg8b"), (4, 1, 8, 8), 10, device="tpu")


@without_gpu
def test_profile_predicts_a_gpu_and_measures_none(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["profile", "vgg8b", "--width", "0.05", "--device", "cuda", "--rules", "global"]
    main([*given, "--batch-size", "4", "--predict", "--json"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["device"] == "cuda"
    assert result["rules"]["global"]["predicted_peak_bytes"] > 0
    assert "a GPU" in " ".join(printed.split())
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--batch-size", "4"])
    assert "torch sees 0 GPUs" in capsys.readouterr().err


def test_where_operations_are_counted_no_kernel_is_compiled() -> None:
    with counting_for("cuda"):
        assert spatial_std.kernels_for(torch.zeros(2, 4, 2, 2)) is None


def test_normalisation_works_in_place_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "LARGE_ELEMENTS", 0)
    maps, results = torch.randn(4, 6, 5, 5, dtype=torch.float64), {}
    for kind in ("cpu", "cuda"):
        torch.manual_seed(0)
        norm = NormalisedActivation(6).double()
        leaf = maps.clone().requires_grad_()
        given = leaf * 1
        with counting_for(kind):
            assert norm.is_by_parts(given)
            norm(given).square().sum().backward()
        results[kind] = [leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_var]
        assert torch.equal(given.detach(), leaf.grad)  # the gradient was written over the maps
    for one, other in zip(*results.values(), strict=True):
        assert torch.equal(one, other)


STEP = StepBytes(lasting=1000, batch=10, units=[300, 200, 100], passed=[50, 40, 0])


def test_streams_add_every_feature_and_a_turn_of_each() -> None:
    assert STEP.singly() == 1300
    assert STEP.recorded(1) == 1310
    assert STEP.recorded(2) == 1000 + 10 + 90 + max(250, 100) + 160
    assert STEP.recorded(3) == STEP.recorded(4) == 1000 + 10 + 90 + 250 + 160 + 100


def test_libraries_hold_memory_for_every_stream() -> None:
    held = StepBytes(STEP.lasting, STEP.batch, STEP.units, STEP.passed, libraries=1000)
    assert held.singly() == STEP.singly() + 1000
    # beside those of the stream on which steps were made before they were recorded
    assert held.recorded(1) == STEP.recorded(1) + 2000
    assert held.recorded(3) == STEP.recorded(3) + 4000


@pytest.mark.parametrize(
    ("limit", "most", "streams"),
    [(None, 4, 1), (1509, 4, 1), (1510, 4, 2), (1610, 4, 3), (10**6, 2, 2), (1305, 4, 0)],
)
def test_as_many_streams_as_keep_to_a_limit(limit: int | None, most: int, streams: int) -> None:
    needed = STEP.recorded(streams) if streams else STEP.singly()
    assert choose_streams(STEP, limit, most) == StepChoice(streams, needed)


def test_streams_that_add_little_are_used_by_default() -> None:
    small = StepBytes(lasting=100_000, batch=10, units=STEP.units, passed=STEP.passed)
    assert choose_streams(small, None).streams == 3


def test_a_limit_below_a_step_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"Cannot keep to --memory 1.2 kB: .* need 1.3 kB"):
        choose_streams(STEP, 1200)


def test_bytes_of_a_step_are_those_that_the_rule_needs() -> None:
    local = learner("vgg8b", "predsim")
    before = {name: value.clone() for name, value in local.model.state_dict().items()}
    found = step_bytes(local, 16)
    (step,) = predict_steps("simultaneous", local, 16, {})
    # the rule's first batch is still there when its second is made
    assert abs(found.singly() - max(step.peaks().values())) <= 2 * 16 * (64 * 4 + 8)
    assert len(found.units) == len(found.passed) == len(local.units)
    assert found.passed[-1] == 0 < min(found.passed[:-1])
    assert all(torch.equal(before[name], value) for name, value in local.model.state_dict().items())
    with counting_for("cuda"):
        assert step_bytes(local, 16).libraries == 2 * 32 * 2**20


def random_joints(count: int, seed: int) -> list[Joint]:
    """Joints each of which keeps what enters it and something of its own."""
    draw = random.Random(seed)
    entering = [draw.randint(1, 20) for _ in range(count)]
    return [
        Joint(
            [],
            {number: size},
            {number: size, 100 + number: draw.randint(1, 30)},
            draw.randint(0, 5),
            draw.randint(1, 9),
        )
        for number, size in enumerate(entering)
    ]


def all_plans(joints: list[Joint], limit: int) -> list[int]:
    """The work of every plan that keeps to a limit, by trying all."""
    works = []
    count = len(joints)
    for ends in itertools.product([False, True], repeat=count - 1):
        cuts = [0, *(place for place, cut in enumerate(ends, 1) if cut), count]
        spans = list(itertools.pairwise(cuts))
        for chosen in itertools.product([False, True], repeat=len(spans)):
            if any(
                end - start > 1 and not again
                for (start, end), again in zip(spans, chosen, strict=True)
            ):
                continue
            kept, work, fits = 0, 0, True
            before: dict[int, int] = {}
            for (start, end), again in zip(spans, chosen, strict=True):
                storages = dict(joints[start].entering)
                for joint in joints[start:end]:
                    storages |= joint.inside
                weights = sum(joint.weights for joint in joints[start:])
                most = sum(storages.values()) + 2 * max(storages.values()) + weights
                fits = fits and kept + most <= limit
                kept += beyond(before, joints[start].entering if again else storages)
                before = {} if again else joints[end - 1].storages()
                work += again * sum(joint.work for joint in joints[start:end])
            works += [work] * fits
    return works


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_recomputes_the_least_of_all_that_fit(seed: int) -> None:
    joints = random_joints(6, seed)
    for limit in (60, 100, 140, 180, 400):
        works = all_plans(joints, limit)
        plan = least_work(joints, limit)
        assert (plan.work if plan else None) == (min(works) if works else None)
    assert least_work(joints, 400) == Plan(
        sum(sum(joint.inside.values()) for joint in joints), 0, plan.segments if plan else ()
    )


def test_checkpointing_by_a_plan_is_global_and_keeps_to_its_limit() -> None:
    data = digits(train_images=48)
    plain, planned = (learner("vgg8b", at=1) for _ in range(2))

    def peak(rule: str, **options: int) -> int:
        (step,) = predict_steps(rule, learner("vgg8b", at=1), 16, options)
        return max(step.peaks().values())

    least, most = peak("checkpointed"), peak("global")
    limit = (least + most) // 2
    assert peak("checkpointed", limit=limit) <= limit < most
    ticks("global", plain, data.train, epochs=1)
    ticks("checkpointed", planned, data.train, epochs=1, limit=limit)
    assert same_weights(plain.model, planned.model)


def test_limits_that_no_plan_keeps_to_are_refused() -> None:
    for options, words in (
        ({"limit": 1000}, "Cannot checkpoint within 1 kB: a step needs"),
        ({"limit": 10**9, "segments": 2}, "Cannot use segments with a limit of memory"),
    ):
        with pytest.raises(InvalidInput, match=words):
            RULES["checkpointed"].order(
                learner("plain", at=1), digits().train, 1, lambda done: 1.0, **options
            )


def test_a_run_that_cannot_keep_to_its_limit_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    given = ["train", "vgg8b", "--width", "0.05", "--rule", "checkpointed", "--output", str(folder)]
    for size, words in (("1kB", "Cannot checkpoint within 1 kB"), ("much", "Cannot use --memory")):
        with pytest.raises(SystemExit, match="2"):
            main([*given, "--memory", size])
        assert words in capsys.readouterr().err
        assert not folder.exists()
