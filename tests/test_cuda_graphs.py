"""Steps that are recorded and replayed learn as single ones do. Most needs a GPU."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.cli import main
from layerwise.core.cuda_graphs import WARM_UP, CapturedSteps
from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES
from layerwise.rules.base import set_rates

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = WARM_UP + 4


def build(
    device: str, model: str = "resnet18", loss: str = "predsim", dropout: float = 0.0, **options
) -> Learner:
    torch.manual_seed(0)
    network = layerwise.create_model(model, width=0.25, dropout=dropout).to(device)
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    options = {"optimizer": adam, "output_layer": "separate", "memory_format": None} | options
    return layerwise.localize(network, torch.zeros(2, 3, 32, 32), 10, loss=loss, seed=0, **options)


def batches(count: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (count, size), generator=generator)
    return list(zip(images.cuda(), labels.cuda(), strict=True))


def losses(learner: Learner, given: list[tuple[Tensor, Tensor]]) -> Tensor:
    results = [
        learner.step(*batch) for batch in given
    ]  # read when all are made: a replay must not write over an earlier result
    return torch.stack([result.loss_tensor() for result in results])


def test_a_learner_on_a_cpu_is_refused():
    with pytest.raises(InvalidInput, match="recorded on a GPU only, and the learner is on cpu"):
        CapturedSteps(build("cpu"))


def test_streams_out_of_range_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--streams", "0", "--output", str(tmp_path / "run")])
    assert leaving.value.code == 2
    assert "Cannot use streams 0: it is out of range. Give 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@needs_gpu
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["resnet18", "vgg8b"])
def test_replayed_steps_learn_as_single_ones(model, loss, streams):
    single, replayed = build("cuda", model, loss), build("cuda", model, loss)
    replayed.captured = CapturedSteps(replayed, streams)
    given = batches(STEPS)
    torch.testing.assert_close(losses(replayed, given), losses(single, given), rtol=2e-3, atol=2e-4)
    assert replayed.captured.refusal is None
    assert len(replayed.captured.recordings) == 1
    for one, other in zip(
        single.model.state_dict().values(), replayed.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-2, atol=1e-2)
    for one, other in zip(single.units, replayed.units, strict=True):
        for state, theirs in zip(
            one.optimizer.state.values(), other.optimizer.state.values(), strict=True
        ):
            assert float(state["step"]) == float(theirs["step"]) == STEPS


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [{"at": 1}, {"amp": torch.bfloat16}, {"clip_grad": 0.1}, {"optimizer": torch.optim.SGD}],
)
def test_other_learners_are_recorded_too(options):
    if "optimizer" in options:
        options = {
            "optimizer": lambda them: torch.optim.SGD(them, lr=0.01, momentum=0.9, fused=True)
        }
    single, replayed = build("cuda", **options), build("cuda", **options)
    replayed.captured = CapturedSteps(replayed)
    given = batches(STEPS)
    torch.testing.assert_close(losses(replayed, given), losses(single, given), rtol=2e-2, atol=2e-3)
    assert replayed.captured.refusal is None


@needs_gpu
@pytest.mark.parametrize(
    "kind", [float, torch.tensor, lambda rate: torch.tensor(rate, device="cuda")]
)
def test_a_rate_that_changes_is_followed(kind):
    single, replayed = (
        build("cuda", optimizer=lambda them: torch.optim.Adam(them, lr=kind(1e-3), fused=True))
        for _ in range(2)
    )
    replayed.captured = CapturedSteps(replayed, streams=2)
    for rate in (1e-3, 1e-2):
        for learner in (single, replayed):
            for group in (group for unit in learner.units for group in unit.optimizer.param_groups):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)  # as schedulers do
                else:
                    group["lr"] = rate
        given = batches(STEPS)
        torch.testing.assert_close(
            losses(replayed, given), losses(single, given), rtol=2e-2, atol=2e-3
        )
    assert replayed.captured.refusal is None


@needs_gpu
def test_a_rate_that_changes_at_every_step_keeps_steps_single():
    learner = build("cuda")
    learner.captured = CapturedSteps(learner)
    for number, batch in enumerate(batches(3 * STEPS)):
        set_rates(learner.units, 1.0 + number % 4)
        learner.step(*batch)
    assert not learner.captured.recordings
    assert len(learner.captured.made) == 1


@needs_gpu
def test_a_changed_rate_and_another_batch_size_are_recorded_anew():
    single, replayed = build("cuda"), build("cuda")
    replayed.captured = CapturedSteps(replayed)
    for factor in (1.0, 0.1):
        for learner in (single, replayed):
            set_rates(learner.units, factor)
        for size in (32, 20):
            given = batches(STEPS, size)
            torch.testing.assert_close(
                losses(replayed, given), losses(single, given), rtol=1e-2, atol=1e-3
            )
    assert len(replayed.captured.recordings) == 2  # those with the first rate are forgotten


@needs_gpu
def test_a_copy_of_a_learner_makes_its_own_steps():
    learner = build("cuda")
    learner.captured = CapturedSteps(learner)
    losses(learner, batches(STEPS))
    assert copy.deepcopy(learner).captured is None


@needs_gpu
def test_learners_of_the_defaults_are_recorded():
    options = {"output_layer": "joined", "memory_format": "auto"}
    single, replayed = build("cuda", **options), build("cuda", **options)
    replayed.captured = CapturedSteps(replayed)
    given = batches(STEPS)
    torch.testing.assert_close(losses(replayed, given), losses(single, given), rtol=2e-3, atol=2e-4)
    assert replayed.captured.refusal is None


@needs_gpu
def test_dropout_depends_on_the_step_alone():
    learner = build("cuda", dropout=0.3)
    learner.captured = CapturedSteps(learner)
    given = batches(2 * STEPS)
    losses(learner, given[:STEPS])
    state = copy.deepcopy(learner.state_dict())
    rest = losses(learner, given[STEPS:])
    drawn = torch.cuda.get_rng_state()
    losses(learner, given[:1])
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    again = build("cuda", dropout=0.3)
    again.captured = CapturedSteps(again)
    again.load_state_dict(state)
    torch.testing.assert_close(losses(again, given[STEPS:]), rest, rtol=2e-3, atol=2e-4)


@needs_gpu
def test_units_that_change_what_they_are_handed_do_not_overlap():
    def learner() -> Learner:
        torch.manual_seed(0)
        layers = (
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(inplace=True),
        )
        network = torch.nn.Sequential(
            *layers, torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 30 * 30, 10)
        )
        return layerwise.localize(network.cuda(), torch.zeros(2, 3, 32, 32), 10, at=["1", "4", "5"])

    single, replayed = learner(), learner()
    replayed.captured = CapturedSteps(replayed, streams=3)
    given = batches(STEPS)
    torch.testing.assert_close(losses(replayed, given), losses(single, given), rtol=1e-3, atol=1e-4)
    assert len(replayed.captured.recordings) == 1
    assert not replayed.captured.streams


@needs_gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(3, 70, 5, 7), (2, 64, 32, 32), (2, 5, 2, 1), (2, 6, 1, 3), (2, 1, 3, 3), (2, 33, 12, 12)],
)
def test_kernels_compute_the_deviation_and_its_gradient(shape, kind, memory_format):
    spatial_std_triton = pytest.importorskip("layerwise.ops.spatial_std_triton")
    torch.manual_seed(0)
    maps = (2 * torch.randn(shape) + 50).to(kind).contiguous(memory_format=memory_format)
    maps[0, 0] = 3.0  # constant over space: no deviation, and no gradient
    expected = maps.double().requires_grad_()
    wanted = expected.std((2, 3))
    mean, deviations = spatial_std_triton.deviation(maps.cuda())
    torch.testing.assert_close(
        mean.cpu()[..., 0, 0], expected.mean((2, 3)).float(), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(deviations.cpu(), wanted.float(), rtol=1e-5, atol=1e-6)
    gradient = torch.randn(shape[:2])
    (of_maps,) = torch.autograd.grad(wanted, expected, gradient.double())
    of_maps[0, 0] = 0.0  # where that of std is not a number
    given = maps.cuda()
    written = spatial_std_triton.write_gradient(given, mean, deviations, gradient.cuda())
    assert written.data_ptr() == given.data_ptr()
    assert float(written[0, 0].abs().max()) == 0.0
    torch.testing.assert_close(
        written.cpu().double(), of_maps, rtol=2**-7 if kind == torch.bfloat16 else 1e-4, atol=1e-5
    )


@needs_gpu
@pytest.mark.parametrize("streams", [1, 3])
def test_what_cannot_be_recorded_is_made_step_by_step(streams):
    class Looking(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * float(images.mean() > -1e9)  # waits for the device

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.Dropout2d(0.2),
        Looking(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 30 * 30, 10),
    ).cuda()
    learner = layerwise.localize(
        network, torch.zeros(2, 3, 32, 32), 10, at=["1", "4"], leaves=["2"], seed=0
    )
    learner.captured = CapturedSteps(learner, streams)
    with pytest.warns(UserWarning, match="They are made one by one"):
        values = losses(learner, batches(STEPS))
    assert learner.captured.refusal
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    learner.captured.forget()
    assert learner.captured.refusal is None
    assert float(values[-1, 0]) != float(values[0, 0])
    assert bool(torch.isfinite(values).all())


class Reading(torch.optim.SGD):
    """Waits for the device after the backward pass."""

    def step(self, closure=None):
        if float(next(group["params"][0] for group in self.param_groups).grad.sum()) != 0.123:
            super().step()


class Counting(torch.optim.SGD):
    """Counts its steps in Python."""

    def step(self, closure=None):
        for group in self.param_groups:
            self.state[group["params"][0]]["count"] = (
                self.state[group["params"][0]].get("count", 0) + 1
            )
        super().step()


@needs_gpu
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("kind", [Reading, Counting])
def test_a_recording_that_fails_leaves_nothing(kind, streams):
    single, replayed = (build("cuda", optimizer=lambda them: kind(them, lr=0.01)) for _ in range(2))
    replayed.captured = CapturedSteps(replayed, streams)
    given = batches(STEPS)
    with pytest.warns(UserWarning, match="They are made one by one"):
        found = losses(replayed, given)
    torch.testing.assert_close(found, losses(single, given), rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in replayed.model.parameters())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for one, other in zip(single.units, replayed.units, strict=True):
        counts = [
            [state.get("count") for state in unit.optimizer.state.values()] for unit in (one, other)
        ]
        assert counts[0] == counts[1]


@needs_gpu
@pytest.mark.parametrize("streams", [1, 3])
def test_a_stop_while_recording_is_a_stop(streams, monkeypatch):
    learner = build("cuda", dropout=0.1)
    learner.captured = CapturedSteps(learner, streams)
    given = batches(STEPS)
    losses(learner, given[:WARM_UP])

    def interrupted(loss: Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(learner.units[2], "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learner.step(*given[WARM_UP])
    assert bool(torch.isfinite(losses(learner, given)).all())
    assert len(learner.captured.recordings) == 1


@needs_gpu
def test_a_state_that_is_loaded_is_gone_on_from():
    single, replayed = build("cuda"), build("cuda")
    replayed.captured = CapturedSteps(replayed)
    given = batches(STEPS)
    state = copy.deepcopy(single.state_dict())
    losses(replayed, given)
    replayed.load_state_dict(state)
    assert not replayed.captured.recordings
    torch.testing.assert_close(losses(replayed, given), losses(single, given), rtol=2e-3, atol=2e-4)


@needs_gpu
def test_kernels_tell_what_is_no_number():
    spatial_std_triton = pytest.importorskip("layerwise.ops.spatial_std_triton")
    maps = torch.ones(2, 4, 3, 3, device="cuda")
    maps[1, 2, 0, 1] = float("nan")
    assert torch.isnan(spatial_std_triton.deviation(maps)[1]).nonzero().tolist() == [[1, 2]]
