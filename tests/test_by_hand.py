"""Numbers and layers that other tests take as given, beside what they are by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.result import StepResult
from layerwise.data.loader import Augmentation
from layerwise.data.splits import choose_augmentation
from layerwise.losses import Evaluated, Targets
from layerwise.losses.infopro import InfoPro
from layerwise.models.resnet import BasicBlock, Bottleneck, Stem
from layerwise.models.vgg import ConvolutionUnit, HiddenUnit
from layerwise.rules.base import Position, Tick
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training import meter as metering
from layerwise.training.evaluate import unit_scores
from layerwise.training.loop import train
from layerwise.training.meter import Meter
from layerwise.training.optimizers import OPTIMIZERS
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.training.schedule import decay
from layerwise.utils.seeds import seeded
from tests.helpers import CLASSES, digits, learner

CPU = Execution(device="cpu")
SMALL = Run("resnet18", hierarchy="1,1,1,1", width=1 / 16, train_images=60, batch_size=16, epochs=3)


# ---- networks ----


def leaky(maps: Tensor) -> Tensor:
    return F.leaky_relu(maps, 0.01)


def normalised(maps: Tensor, norm: Any) -> Tensor:
    """Batch normalisation in PyTorch's own words."""
    mean, variance = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    return F.batch_norm(maps, mean, variance, norm.weight, norm.bias, norm.training, eps=1e-5)


def shortcut(block: Any, features: Tensor, stride: int) -> Tensor:
    if isinstance(block.shortcut, nn.Identity):
        return features
    projection, norm = block.shortcut
    return normalised(F.conv2d(features, projection.weight, None, stride), norm)


def basic(block: Any, features: Tensor, stride: int) -> Tensor:
    inner = leaky(normalised(F.conv2d(features, block.conv1.weight, None, stride, 1), block.norm1))
    outer = normalised(F.conv2d(inner, block.conv2.weight, None, 1, 1), block.norm2)
    return leaky(outer + shortcut(block, features, stride))


def bottleneck(block: Any, features: Tensor, stride: int) -> Tensor:
    narrow = leaky(normalised(F.conv2d(features, block.conv1.weight), block.norm1))
    inner = leaky(normalised(F.conv2d(narrow, block.conv2.weight, None, stride, 1), block.norm2))
    outer = normalised(F.conv2d(inner, block.conv3.weight), block.norm3)
    return leaky(outer + shortcut(block, features, stride))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "inputs", "stride", "expected"),
    [
        (BasicBlock, 4, 1, basic),
        (BasicBlock, 3, 2, basic),
        (Bottleneck, 16, 1, bottleneck),
        (Bottleneck, 3, 2, bottleneck),
    ],
)
def test_blocks_add_the_shortcut_before_the_activation(
    kind: Any, inputs: int, stride: int, expected: Callable[..., Tensor], training: bool
) -> None:
    torch.manual_seed(0)
    block = kind(inputs, 4, stride, 0.0, "")
    for name, value in block.named_buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
        assert name
    for value in block.parameters():
        nn.init.normal_(value, 0.2, 0.5)
    block.train(training)
    features = torch.randn(5, inputs, 6, 6)
    torch.testing.assert_close(
        block(features.clone()), expected(block, features, stride), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("training", [True, False])
def test_units_of_vgg_are_convolution_normalisation_activation(training: bool) -> None:
    torch.manual_seed(0)
    unit, hidden = ConvolutionUnit(3, 4, 0.0).train(training), HiddenUnit(6, 4, 0.0).train(training)
    images, vectors = torch.randn(5, 3, 6, 6), torch.randn(5, 6)
    maps = F.conv2d(images, unit.conv.weight, unit.conv.bias, 1, 1)
    torch.testing.assert_close(unit(images), leaky(normalised(maps, unit.norm)))
    linear = F.linear(vectors, hidden.linear.weight, hidden.linear.bias)
    torch.testing.assert_close(hidden(vectors), leaky(normalised(linear, hidden.norm)))


def test_dropout_takes_whole_channels_of_maps_and_single_numbers_of_vectors() -> None:
    maps = (
        ConvolutionUnit(3, 4, 0.5),
        Stem(3, 4, False, 0.5),
        BasicBlock(3, 4, 1, 0.5, ""),
        Bottleneck(3, 4, 1, 0.5, ""),
    )
    assert {type(module.dropout) for module in maps} == {nn.Dropout2d}
    assert type(HiddenUnit(3, 4, 0.5).dropout) is nn.Dropout


def test_random_draws_depend_on_seed_unit_and_step() -> None:
    def drawn(seed: int, unit: int, step: int) -> Tensor:
        with seeded(seed, unit, step, torch.device("cpu")):
            return torch.rand(4)

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    values = [tuple(drawn(*place).tolist()) for place in places]
    assert [tuple(drawn(*place).tolist()) for place in places] == values
    assert len(set(values)) == len(places)


# ---- settings of a run ----


def test_the_rate_falls_to_a_quarter_at_each_milestone() -> None:
    schedule = decay(Run())
    shares = (0.0, 0.49, 0.5, 0.75, 0.89, 0.94, 0.99)
    assert [schedule(share) for share in shares] == [1, 1, *(0.25**n for n in (1, 2, 3, 4, 4))]


@pytest.mark.parametrize(
    ("name", "kind", "momentum", "nesterov"),
    [
        ("adam", torch.optim.Adam, None, None),
        ("adamw", torch.optim.AdamW, None, None),
        ("sgd", torch.optim.SGD, 0.7, False),
        ("nesterov", torch.optim.SGD, 0.7, True),
    ],
)
def test_optimizers_have_the_runs_settings(
    name: str, kind: type, momentum: float | None, nesterov: bool | None
) -> None:
    run = Run(optimizer=name, lr=0.03, weight_decay=0.002, momentum=0.7)
    made = OPTIMIZERS[name](run)([nn.Parameter(torch.ones(1))])
    assert type(made) is kind
    (group,) = made.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.03, 0.002)
    assert (group.get("momentum"), group.get("nesterov")) == (momentum, nesterov)


def test_a_learner_has_the_settings_of_its_run() -> None:
    run = replace(SMALL, data="digits", dropout=0.3, clip_grad=0.1, amp=True, loss="infopro")
    prepared = prepare(run, CPU)
    data = prepared.load_data()
    local = prepared.make_learner(data)
    assert {unit.clip_grad for unit in local.units} == {0.1}
    assert {unit.amp for unit in local.units} == {torch.bfloat16}
    dropouts = [m for m in local.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    assert {module.p for module in dropouts} == {0.3}
    head = local.units[0].loss
    assert isinstance(head, InfoPro)
    assert head.mean is not None
    assert head.mean.flatten().tolist() == pytest.approx(data.normalization[0], 1e-5)


def test_half_of_the_images_are_mirrored_and_crops_reach_the_border() -> None:
    draws = Augmentation(padding=2, flip=True).draw(1000, 8, seed=0)
    assert 0.4 < draws.flips.float().mean() < 0.6
    assert (draws.offsets.min(), draws.offsets.max()) == (-2, 2)
    assert not Augmentation(padding=2).draw(1000, 8, seed=0).flips.any()


def test_a_run_augments_as_its_data_set_does_unless_it_says_otherwise() -> None:
    def chosen(**changes: Any) -> Augmentation:
        return choose_augmentation(Run(**changes), 4, True, 32)

    assert chosen() == Augmentation(4, True, 0)
    assert chosen(flip=False, crop_padding=1, cutout=8) == Augmentation(1, False, 8)
    assert chosen(augment=False) == Augmentation()


# ---- numbers of a run ----


def ticks_of(losses: list[list[float]], correct: list[list[int]], sizes: list[int]) -> list[Tick]:
    """One epoch: losses and correct examples by batch and unit."""
    count = len(sizes)
    ticks = []
    for number, (values, hits, size) in enumerate(zip(losses, correct, sizes, strict=True), 1):
        pairs = zip(map(torch.tensor, values), map(torch.tensor, hits), strict=True)
        result = StepResult([Evaluated(*pair) for pair in pairs], size)
        ends = number == count
        after = Position(1, 0) if ends else Position(0, number)
        ticks.append(Tick(after, 0, result, ends, count, 1))
    return ticks


def test_means_of_an_epoch_are_over_its_images() -> None:
    local = learner("plain")
    count = len(local.units)
    meter = Meter(local)
    ticks = ticks_of([[1.0] * count, [4.0] * count], [[3] * count, [1] * count], [6, 2])
    for tick in ticks:
        meter.add(tick)
    assert meter.running() == pytest.approx(((6 * 1 + 2 * 4) / 8, 50.0))
    record = meter.end_epoch(ticks[-1], {})
    for unit in record["units"]:
        assert unit["loss"] == pytest.approx((6 * 1 + 2 * 4) / 8)
        assert unit["accuracy"] == pytest.approx(100 * 4 / 8)


def test_images_per_second_are_of_the_steps_whose_time_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(metering.time, "perf_counter", lambda: now[0])
    local = learner("plain")
    count, meter = len(local.units), Meter(local)

    def steps() -> Any:
        for tick in ticks_of([[1.0] * count] * 4, [[1] * count] * 4, [5] * 4):
            now[0] += 0.5
            yield tick

    making = steps()
    for _ in range(4):
        meter.next_tick(making)
    # the second step is measured for its memory, so its time is left out
    assert meter.images_per_second() == pytest.approx(3 * 5 / (3 * 0.5))
    now[0] += 100
    assert meter.result()["images_per_second"] == pytest.approx(10)


def test_a_steps_accuracies_are_percent_of_its_batch() -> None:
    pairs = [Evaluated(torch.zeros(()), torch.tensor(count)) for count in (0, 3, 8)]
    assert StepResult(pairs, 8).accuracies == [0.0, 37.5, 100.0]
    assert repr(StepResult(pairs[1:2], 8)) == "StepResult(losses=[0.0], accuracies=[37.5])"


def test_scores_of_units_are_those_of_the_whole_set_at_once() -> None:
    data, local = digits(41), learner("plain", "pred")
    images = torch.cat([images for images, _ in data.test.batches(0)])
    labels = torch.cat([labels for _, labels in data.test.batches(0)])
    scores = unit_scores(local, data.test, 0, len(local.units) - 1)
    assert len(labels) % data.test.batch_size  # the last batch is smaller
    local.train(False)
    activations: Any = (images,)
    with torch.no_grad():
        for unit, score in zip(local.units, scores, strict=True):
            activations, (loss, correct) = unit.evaluate(activations, Targets(labels, CLASSES))
            assert score.loss == pytest.approx(loss.item(), rel=1e-4)
            assert score.accuracy == pytest.approx(100 * int(correct) / len(labels))


def test_evaluation_is_every_so_many_epochs_and_at_the_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    execution = replace(CPU, eval_every=2, cpu_threads=1)
    train(prepare(SMALL, execution), folder, resume=False, progress=Progress())
    evaluated = [line["val_accuracy"] is not None for line in folder.log()]
    assert evaluated == [False, True, True]
