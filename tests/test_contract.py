"""The equalities that define correctness, over every registered network, loss, rule, measure and
data set: to be listed is to be tested.

Those over networks and losses are asserted twice, plain and with the kernels forced that are made
for large maps and for a matrix unit: equal bits stay equal bits. Forced beside plain, and the loss
over pairs in bfloat16, are close: within 1e-4 of a gradient's length in float32, 5 % in bfloat16.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.data import DATASETS
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Site, Targets, create_loss
from layerwise.measures import MEASURES
from layerwise.rules import RULES
from tests import contract
from tests.contract import PLAIN, Kernels
from tests.helpers import (
    EVERYWHERE,
    NETWORKS,
    ON_FEW,
    READING,
    RULES_AND_LOSSES,
    SOME_NETWORKS,
    WHOLE,
    digits,
    learner,
    ticks,
)
from tests.ranks import on_ranks

LOCAL_RULES = [name for name, rule in RULES.items() if rule.at is None]
OTHER_RULES = [name for name in LOCAL_RULES if name != "simultaneous"]
FORCED_NETWORKS = ("vgg8b", "resnet18")  # they have all of the layers that have fast kernels
FEW, RESIDUAL = "plain", "resnet18"  # the networks of losses that are tested on few


def carrying_terms(site: Site) -> torch.nn.Module:
    """A loss that carries all terms."""
    return create_loss("pred", site, transport=0.1, own_input=0.1)


NEWER = (*ON_FEW, carrying_terms)
READERS = (*READING, carrying_terms)  # terms read what entered the unit
RESUMED = ("vgg8b", "resnet18")
UNPLANNED = [rule for rule in RULES if rule != "checkpointed"]  # its plan takes a second

# the whole losses on every network, every loss on one; forced, every loss on one with shortcuts
PLAIN_PAIRS: list[tuple[str, Any]] = [(name, loss) for loss in WHOLE for name in SOME_NETWORKS]
PLAIN_PAIRS += [(FEW, loss) for loss in (*EVERYWHERE, *NEWER) if loss not in WHOLE]
FORCED_PAIRS = [(RESIDUAL, loss) for loss in EVERYWHERE] + [("vgg8b", loss) for loss in WHOLE]
KERNELS = pytest.mark.parametrize(
    ("name", "loss", "kernels"),
    [(*pair, "plain") for pair in PLAIN_PAIRS] + [(*pair, "forced") for pair in FORCED_PAIRS],
    indirect=["kernels"],
)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "plain":
        yield PLAIN
        return
    with contract.forced_kernels() as forced:
        yield forced
    assert forced.entered["normalisation"]
    assert forced.entered["products"]


@pytest.mark.parametrize(
    ("name", "loss"),
    [(name, loss) for name in FORCED_NETWORKS for loss in EVERYWHERE]
    + [(RESIDUAL, loss) for loss in ON_FEW],
)
def test_forced_kernels_are_entered(name: str, loss: str) -> None:
    images, labels = next(digits().train.batches(0))
    with contract.forced_kernels() as kernels:
        local = learner(name, loss, amp=kernels.amp)
        local.step(images, labels)
    wanted = {"normalisation", "products"}
    wanted |= {"deviation"} if "sim" in loss else set()
    wanted |= {"windows"} if loss == "predsim-lite" else set()
    assert set(kernels.entered) == wanted


@pytest.mark.parametrize(
    ("amp", "tolerance"), [(None, 1e-4), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("loss", EVERYWHERE)
@pytest.mark.parametrize("name", FORCED_NETWORKS)
def test_forced_kernels_give_the_same_gradients(
    name: str, loss: str, amp: torch.dtype | None, tolerance: float
) -> None:
    contract.forced_kernels_give_the_same_gradients(name, loss, amp, tolerance)


@pytest.mark.parametrize("loss", ["predsim", "predsim-lite"])
@pytest.mark.parametrize("name", FORCED_NETWORKS)
def test_windows_of_large_maps_have_the_same_gradients(name: str, loss: str) -> None:
    contract.forced_kernels_give_the_same_gradients(name, loss, None, 1e-4, span=2)


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("at", ["layer", "block", 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_units_composed_are_the_network(name: str, at: Any, training: bool) -> None:
    contract.units_compose_the_network(name, at, training)


@pytest.mark.parametrize("at", ["layer", "block", 1, 2])
@pytest.mark.parametrize("name", FORCED_NETWORKS)
def test_units_composed_are_the_network_by_forced_kernels(name: str, at: Any) -> None:
    with contract.forced_kernels() as kernels:
        contract.units_compose_the_network(name, at, True, kernels)


# of its only unit a loss gives what the output is weighed by, the same on every network
@pytest.mark.parametrize(
    ("name", "loss", "kernels"),
    [(name, "predsim", "plain") for name in SOME_NETWORKS]
    + [(name, "predsim", "forced") for name in FORCED_NETWORKS]
    + [(FEW, loss, "plain") for loss in (*EVERYWHERE, *NEWER) if loss != "predsim"],
    indirect=["kernels"],
)
def test_one_unit_is_global_backpropagation(name: str, loss: Any, kernels: Kernels) -> None:
    contract.one_unit_is_global_backpropagation(name, loss, kernels)


# one start of two ranks for all of them, since each start takes a second
ON_RANKS: list[tuple[str, Any, str]] = [(name, "predsim", "plain") for name in SOME_NETWORKS]
ON_RANKS += [
    (FEW, loss, "plain") for loss in (*EVERYWHERE, *NEWER) if loss not in ("predsim", "look-ahead")
]
ON_RANKS += [(RESIDUAL, "predsim", "forced"), (RESIDUAL, "infopro", "plain")]


def all_on_ranks() -> int:
    for name, loss, kernels in ON_RANKS:
        with nullcontext(PLAIN) if kernels == "plain" else contract.forced_kernels() as used:
            contract.parallel_is_simultaneous(name, loss, used)
    return len(ON_RANKS)


def test_parallel_is_simultaneous() -> None:
    assert on_ranks(all_on_ranks, patience=200.0) == [len(ON_RANKS)] * 2


@KERNELS
def test_sequential_with_cached_features_is_sequential_without(
    name: str, loss: Any, kernels: Kernels, tmp_path: Path
) -> None:
    contract.cached_features_change_nothing(name, loss, tmp_path, kernels)


@pytest.mark.parametrize(
    ("name", "rule", "loss", "kernels"),
    [(FEW, rule, loss, "plain") for rule, loss in RULES_AND_LOSSES]
    + [(name, rule, "predsim", "plain") for name in RESUMED for rule in UNPLANNED]
    + [("vgg8b", rule, "predsim", "forced") for rule in UNPLANNED]
    + [("vgg8b", "simultaneous", loss, "forced") for loss in EVERYWHERE if loss != "predsim"]
    + [(FEW, "simultaneous", loss, "plain") for loss in NEWER]
    + [(FEW, rule, loss, "plain") for rule in OTHER_RULES for loss in READERS],
    indirect=["kernels"],
)
def test_interrupted_and_resumed_is_uninterrupted(
    name: str, rule: str, loss: Any, kernels: Kernels
) -> None:
    contract.resumed_is_uninterrupted(name, rule, loss, kernels)


@pytest.mark.parametrize("loss", ["pred", "auglocal", "look-ahead"])
def test_interrupted_and_resumed_is_uninterrupted_in_windows(loss: str) -> None:
    contract.resumed_is_uninterrupted(RESIDUAL, "simultaneous", loss, span=2)


@KERNELS
def test_no_gradient_crosses_a_border(name: str, loss: Any, kernels: Kernels) -> None:
    contract.no_gradient_crosses_a_border(name, loss, kernels)


@pytest.mark.parametrize("loss", ["predsim", "infopro"])
def test_no_gradient_crosses_a_windows_border(loss: str) -> None:
    contract.no_gradient_crosses_a_border(RESIDUAL, loss, span=2)


@pytest.mark.parametrize(
    ("rule", "loss"),
    [("simultaneous", loss) for loss in (*EVERYWHERE, *NEWER)]
    + [(rule, loss) for rule in OTHER_RULES for loss in WHOLE],
)
def test_every_rule_and_loss_learns(rule: str, loss: Any) -> None:
    # one does not see how large features are, and needs a network that normalises them
    contract.rule_and_loss_learn(rule, loss, "vgg8b" if loss == "lls" else FEW)


def test_windows_learn() -> None:
    contract.rule_and_loss_learn("simultaneous", "pred", span=2)


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_other_orders_of_updates_refuse_windows(rule: str) -> None:
    local = learner("plain", "pred", span=2)
    with pytest.raises(InvalidInput, match=f"by the rule '{rule}' with span 2"):
        ticks(rule, local, digits().train, epochs=1)


def test_recorded_steps_of_windows_are_refused() -> None:
    local = learner("plain", "pred", span=2)
    with pytest.raises(InvalidInput, match="Cannot record steps with span 2"):
        local.captured = lambda *given: list[Evaluated]()


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_keeps_its_promises(name: str) -> None:
    contract.measure_keeps_its_promises(name)


@pytest.mark.parametrize(("features", "labels", "sentence"), contract.UNMEASURABLE)
@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_refuses_what_it_cannot_measure(
    name: str, features: Tensor, labels: Tensor, sentence: str
) -> None:
    contract.measure_refuses(name, features, labels, sentence)


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_of_the_table_is_whole(name: str) -> None:
    contract.entry_of_the_table_is_whole(name)


def test_digits_are_as_their_entry_says(tmp_path: Path) -> None:
    contract.data_set_is_as_its_entry_says("digits", tmp_path)


def cosine(a: list[float], b: list[float]) -> float:
    a, b = [v - sum(a) / len(a) for v in a], [v - sum(b) / len(b) for v in b]
    lengths = [1e-8 + sum(v * v for v in vector) ** 0.5 for vector in (a, b)]
    return max(
        -1.0, min(1.0, sum(x * y for x, y in zip(a, b, strict=True)) / lengths[0] / lengths[1])
    )


@pytest.mark.parametrize(
    "shape", [(8, 4, 4), (8, 5, 3), (3, 4, 4), (8, 1, 1), (12,), (2,)], ids=str
)
@pytest.mark.parametrize("forced", [False, True], ids=["plain", "forced"])
def test_predsim_is_a_loop_over_pairs(shape: tuple[int, ...], forced: bool) -> None:
    torch.manual_seed(0)
    loss = create_loss("predsim", Site(0, 2, shape, 4), beta=0.7, decoder_dim=16)
    torch.nn.init.normal_(loss.pred.classifier.weight)
    features, labels = torch.randn(6, *shape), torch.tensor([0, 1, 1, 3, 0, 2])

    transformed = loss.sim.transform(features)
    vectors = []
    for example in transformed:
        if len(shape) == 3 and shape[0] > 3 and shape[1] * shape[2] > 1:
            rows = [channel.flatten().tolist() for channel in example]
            means = [sum(row) / len(row) for row in rows]
            vectors.append(
                [
                    (sum((v - m) ** 2 for v in r) / (len(r) - 1)) ** 0.5
                    for r, m in zip(rows, means, strict=True)
                ]
            )
        else:
            vectors.append(example.flatten().tolist())
    onehot = [[float(label == c) for c in range(4)] for label in labels]
    pairs = [(i, j) for i in range(6) for j in range(6)]
    sim = (
        sum((cosine(vectors[i], vectors[j]) - cosine(onehot[i], onehot[j])) ** 2 for i, j in pairs)
        / 36
    )

    pooled = features
    if len(shape) == 3:
        height, width, turn = 1, 1, True
        while shape[0] * -(-shape[1] // height) * -(-shape[2] // width) > 16 and (
            height < shape[1] or width < shape[2]
        ):
            height, width, turn = (2 * height, width, False) if turn else (height, 2 * width, True)
        pooled = torch.stack(
            [
                features[:, :, i : i + height, j : j + width].mean((2, 3))
                for i in range(0, shape[1], height)
                for j in range(0, shape[2], width)
            ],
            dim=2,
        )
    pred = F.cross_entropy(loss.pred.classifier(pooled.flatten(1)), labels)
    expected = 0.7 * sim + 0.3 * pred.item()
    if not forced:
        value, _ = loss(features, Targets(labels, 4))
        assert value.item() == pytest.approx(expected, rel=1e-4)
        return
    with contract.forced_kernels() as kernels, kernels.precision():  # in bfloat16
        value, _ = loss(features, Targets(labels, 4))
    assert value.item() == pytest.approx(expected, rel=2e-2)
