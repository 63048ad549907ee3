"""Replicas that share every batch learn as one process does with the whole batch."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import layerwise
from layerwise.core.unit import Unit
from layerwise.data.loader import Share
from layerwise.distributed import gathered, replicate, world
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES
from layerwise.ops.replicated import synchronised
from layerwise.runs.folder import WEIGHTS, RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import Interrupted, train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.utils.options import Options
from tests.helpers import CLASSES, FOREIGN, digits, narrow, ticks
from tests.ranks import StopAfter, on_ranks

BATCH = 11  # shares of 6 and 5
STEPS = 3
EXACT = 1e-9  # relative to the largest number, in float64
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda weights: torch.optim.Adam(weights, lr=1e-3, eps=1e-3, fused=True),
}
Batch = tuple[Tensor, Tensor]


def whole_batches(dtype: torch.dtype = torch.float64) -> Iterator[Batch]:
    drawn = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 1, 8, 8, generator=drawn, dtype=torch.float64)
        yield images.to(dtype), torch.randint(CLASSES, (BATCH,), generator=drawn)


def own_share(batch: Batch) -> Batch:
    images, labels = (each.tensor_split(world().size)[world().rank] for each in batch)
    return images, labels


def local(
    name: str = "vgg8b", dtype: torch.dtype = torch.float64, **options: Any
) -> layerwise.Learner:
    torch.manual_seed(0)
    network = FOREIGN[name]() if name in FOREIGN else narrow(name, dropout=0.0)
    sample = torch.zeros(2, 1, 8, 8, dtype=dtype)
    options = {"optimizer": OPTIMIZERS["sgd"], "seed": 0, "check": False} | options
    return layerwise.localize(network.to(dtype), sample, CLASSES, **options)


def numbers(learner: layerwise.Learner) -> list[Tensor]:
    """All weights, buffers and numbers of optimizers."""
    return [*learner.model.state_dict().values(), *beside_pieces(learner.units)]


def own_numbers(learner: layerwise.Learner) -> list[Tensor]:
    """Those of the units that live on this rank."""
    pieces = [unit.piece.state_dict().values() for unit in learner.own_units]
    return [*chain.from_iterable(pieces), *beside_pieces(learner.own_units)]


def beside_pieces(units: Sequence[Unit]) -> list[Tensor]:
    """Weights and buffers of heads, and numbers of optimizers."""
    tensors = [tensor for unit in units for tensor in unit.loss.state_dict().values()]
    for unit in units:
        for state in unit.optimizer.state.values() if unit.optimizer else ():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors


def difference(one: layerwise.Learner, other: layerwise.Learner) -> float:
    """The largest difference of two learners' numbers, relative to the largest of its tensor."""
    pairs = list(zip(numbers(one), numbers(other), strict=True))
    assert pairs
    return max(
        float((mine - its).detach().abs().max() / its.detach().abs().max().clamp(min=1e-3))
        for mine, its in pairs
        if its.numel()
    )


def alike_everywhere(learner: layerwise.Learner, length: int = 1) -> bool:
    """Whether all replicas, of so many ranks each, have the same numbers, to the bit."""
    everyone = gathered([tensor.clone() for tensor in own_numbers(learner)])
    assert all(everyone)  # no rank is without any
    return all(
        torch.equal(mine, its)
        for rank, numbers_there in enumerate(everyone)
        for mine, its in zip(everyone[rank % length], numbers_there, strict=True)
    )


def compared(options: dict[str, Any]) -> float:
    """The difference that sharing batches makes after some steps, in numbers; checks results."""
    shared = local(**options)
    before, whole = copy.deepcopy(shared.model), copy.deepcopy(shared)
    replicate(shared)
    for batch in whole_batches():
        expected, result = whole.step(*batch), shared.step(*own_share(batch))
        assert result.size == expected.size == BATCH
        assert result.accuracies == expected.accuracies
        assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    assert alike_everywhere(shared)
    weights = list(zip(before.parameters(), shared.model.parameters(), strict=True))
    assert any(not torch.equal(first, last) for first, last in weights)
    return difference(shared, whole)


CASES: dict[str, dict[str, Any]] = {
    **{
        loss: {"at": 3, "loss": loss, "optimizer": OPTIMIZERS[("sgd", "adam")[number % 2]]}
        for number, loss in enumerate(LOSSES)
    },
    "clipped": {"name": "resnet18", "at": 3, "optimizer": OPTIMIZERS["adam"], "clip_grad": 0.01},
    "global": {"name": "resnet18", "at": 1, "optimizer": OPTIMIZERS["adam"]},
    "windows": {"at": 3, "span": 2},
    "standardized": {"at": 3, "loss": "match", "standardize": True},
    "functions": {"name": "branches", "loss": "sim"},
}


def all_compared() -> dict[str, float]:
    return {name: compared(options) for name, options in CASES.items()}


def test_replicas_learn_as_one_process_with_the_whole_batch() -> None:
    """By every loss, plain SGD and Adam, with batch statistics of the whole batch."""
    for differences in on_ranks(all_compared):
        assert differences.keys() == CASES.keys()
        assert {name: value for name, value in differences.items() if value > EXACT} == {}


COMBINATIONS = list(product((1, 3), (None, torch.bfloat16, torch.float16), (None, 0.02)))
# every value with every value of each other option
PAIRS = [
    each for each in COMBINATIONS if (each[0] == 1) ^ (each[1] == torch.bfloat16) ^ bool(each[2])
]


def combined(parts: int, amp: torch.dtype | None, clip_grad: float | None) -> float | None:
    """The difference after an epoch of batches in parts, in mixed precision and clipped.

    That of mixed precision is relative to what mixed precision itself changes, and the median over
    units: rounding may decide which way a kink of one is passed. Of four ranks, two are a replica;
    then the first alone has the number, and others None.
    """
    options: dict[str, Any] = {"dtype": torch.float32 if amp else torch.float64}
    options |= {"at": 3, "clip_grad": clip_grad, "optimizer": plain_sgd}
    shared, whole, exact = (local(**options, amp=kind) for kind in (amp, amp, None))
    for unit in (*shared.units, *whole.units):
        if unit.scaler is not None:  # no step overflows, which sums of shares do later than wholes
            unit.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    length = world().size // 2
    if length == 1:
        replicate(shared)
    else:
        layerwise.distribute(shared, "2,1", replicas=2)
    share = Share(world().rank // length, 2, parts)
    data, own = (
        Converted(loader, options["dtype"])
        for loader in (digits(44).train, digits(44).train.shared(share))
    )
    rule = "simultaneous" if length == 1 else "parallel"
    made = ticks(rule, shared, own, epochs=1, micro_batches=parts)
    assert alike_everywhere(shared, length)
    with layerwise.whole(shared) as first:
        if length > 1 and not first:
            return None
        expected = ticks("simultaneous", whole, data, epochs=1, micro_batches=parts)
        assert [tick.after for tick in made] == [tick.after for tick in expected]
        assert [tick.result.size for tick in made] == [tick.result.size for tick in expected]
        assert scales(shared) == scales(whole)  # of float16
        if amp is None:
            return difference(shared, whole)
        ticks("simultaneous", exact, data, epochs=1, micro_batches=parts)
        flats = zip(*map(flat_units, (shared, whole, exact)), strict=True)
        return median(float((one - two).norm() / (three - two).norm()) for one, two, three in flats)


def scales(learner: layerwise.Learner) -> list[float]:
    return [unit.scaler.get_scale() for unit in learner.units if unit.scaler is not None]


def plain_sgd(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=1e-3)


def flat_units(learner: layerwise.Learner) -> list[Tensor]:
    """All weights of each unit, one behind the other."""
    return [torch.cat([w.detach().flatten() for w in unit.weights()]) for unit in learner.units]


class Converted:
    """A loader's batches with images of another number type."""

    def __init__(self, loader: Any, dtype: torch.dtype) -> None:
        self.loader, self.dtype = loader, dtype

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for images, labels in self.loader.batches(epoch, start):
            yield images.to(self.dtype), labels


def all_combined(combinations: Sequence[Any]) -> list[float | None]:
    return [combined(*combination) for combination in combinations]


@pytest.mark.parametrize(
    ("size", "combinations"),
    [(2, PAIRS), pytest.param(4, COMBINATIONS, marks=pytest.mark.slow)],
    ids=["2", "4"],
)
def test_parts_mixed_precision_and_clipping_go_together(
    size: int, combinations: Sequence[Any]
) -> None:
    """On two replicas of a rank each, and of two."""
    for rank, differences in enumerate(on_ranks(all_combined, combinations, size=size)):
        if size > 2 and rank > 0:
            assert differences == [None] * len(combinations)
            continue
        for combination, value in zip(combinations, differences, strict=True):
            assert value < (1.0 if combination[1] else EXACT), (combination, differences)


def on_both(task: Callable[[], Any]) -> list[Any]:
    """What a small task returns on each of two ranks; one start carries out all of them."""
    results = small_results()
    assert all(isinstance(result, dict) for result in results), results
    return [result[task.__name__] for result in results]


@cache
def small_results() -> list[Any]:
    return on_ranks(small_tasks)


def small_tasks() -> dict[str, Any]:
    tasks = (by_shares, noted, normalised, overflowing, steps_refused)
    return {task.__name__: task() for task in tasks}


def by_shares() -> float:
    """How far one step with everything of each share is from the mean of two lone steps."""
    shared = local(at=3, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.05))
    images, labels = (each[:10] for each in next(whole_batches()))
    lone = [copy.deepcopy(shared) for _ in range(2)]
    replicate(shared, sync_batch_norm=False, gather_examples=False)
    shared.step(*own_share((images, labels)))
    for learner, part, its_labels in zip(lone, images.split(5), labels.split(5), strict=True):
        learner.step(part, its_labels)
    return max(
        float((weight - (first + second) / 2).detach().abs().max())
        for weight, first, second in zip(
            *(learner.model.parameters() for learner in (shared, *lone)), strict=True
        )
    )


def test_statistics_and_similarities_can_be_of_each_share() -> None:
    for value in on_both(by_shares):
        assert value < EXACT


@dataclass
class Noting:
    """Replicas that tell when a unit hands its gradients over."""

    replicas: Any
    average: Callable[..., None]

    def examples_at_hand(self, unit: layerwise.Unit) -> int:
        return self.replicas.examples_at_hand(unit)


def noted() -> list[str]:
    """Events of units over some steps."""
    events: list[str] = []
    learner = local("plain", loss="pred")
    replicate(learner)

    def note(what: str, unit: layerwise.Unit, then: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            events.append(f"{what} {unit.index}")
            return then(*arguments)

        return noting

    for unit in learner.units:
        unit.evaluate = note("forward", unit, unit.evaluate)  # type: ignore[method-assign]
        unit.sharing = Noting(unit.sharing, note("send", unit, unit.sharing.average))
        unit.update = note("update", unit, unit.update)  # type: ignore[method-assign]
    for batch in whole_batches():
        learner.step(*own_share(batch))
    return events


def test_gradients_travel_while_the_next_unit_computes() -> None:
    """And every update comes before the unit's next forward pass."""
    for events in on_both(noted):
        assert [event for event in events if "update" not in event] == [
            "forward 0", "send 0", "forward 1", "send 1",
        ] * STEPS  # fmt: skip
        for unit in ("0", "1"):
            own = [event.split()[0] for event in events if event.endswith(unit)]
            assert own == ["forward", "send", "update"] * STEPS


SHAPES = [(7, 5, 3, 2), (7, 5), (9, 3, 4), (5, 2, 2, 2, 2)]


def normalised() -> list[float]:
    kinds = ((True, True), (True, False), (False, True))
    return [of_shape(shape, *kind) for shape in SHAPES for kind in kinds]


def of_shape(shape: tuple[int, ...], affine: bool, biased: bool) -> float:
    """The largest relative difference between shared normalisation and that of all maps."""
    learner = local("plain")
    replicate(learner)
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    torch.manual_seed(0)
    whole = kinds[len(shape)](shape[1], affine=affine, dtype=torch.float64)
    if not biased:
        whole.register_parameter("bias", None)
    shared = copy.deepcopy(whole)
    maps = torch.randn(shape, dtype=torch.float64) + 1e4  # squares of it lose half of the digits
    gradient = torch.randn(shape, dtype=torch.float64) / len(maps)
    own = learner.replicas.meet(len(maps.tensor_split(world().size)[world().rank]), True)
    pairs = []
    for norm, share in ((whole, None), (shared, own)):
        read = (maps if share is None else maps[share.own_rows]).clone().requires_grad_()
        if share is None:
            result = norm(read)
            result.backward(gradient)
            pairs.append([result[own.own_rows], read.grad[own.own_rows]])
        else:
            with synchronised(share):
                result = norm(read)
            result.backward(gradient[share.own_rows])
            pairs.append([result, read.grad])
            for weight in norm.parameters():
                weight.grad = share.total(weight.grad)
        pairs[-1] += [weight.grad for weight in norm.parameters()]
        pairs[-1] += [norm.running_mean, norm.running_var]
    return max(
        float((mine - its).detach().abs().max() / its.detach().abs().max())
        for its, mine in zip(*pairs, strict=True)
    )


def test_batch_normalisation_of_shares_is_that_of_the_whole_batch() -> None:
    for differences in on_both(normalised):
        assert max(differences) < 1e-7, differences  # 1e4 takes 4 of 16 digits from the maps


def test_shares_make_up_the_batch() -> None:
    indices = torch.arange(37)
    for count, parts in product((1, 2, 3, 5), (1, 2, 4, 50)):
        shares = [Share(replica, count, parts).of(indices) for replica in range(count)]
        assert sorted(torch.cat(shares).tolist()) == indices.tolist()
        assert min(map(len, shares)) >= 2
        halves = [Share(replica, 2, 2).of(indices).tensor_split(2)[0] for replica in range(2)]
        assert sorted(torch.cat(halves).tolist()) == indices.tensor_split(2)[0].tolist()


def test_batches_that_are_too_small_are_left_out_or_refused() -> None:
    whole = digits(50).train  # batches of 16, 16, 16 and 2
    shared = whole.shared(Share(1, 2))
    assert (len(whole), len(shared)) == (4, 3)
    assert [len(labels) for _, labels in shared.batches(0)] == [8, 8, 8]
    with pytest.raises(InvalidInput, match="Cannot share batches of 16 images among 9 replicas"):
        whole.shared(Share(0, 9))


def overflowing() -> tuple[list[bool], list[float]]:
    """Whether units stayed in a step of float16 in which one overflowed on the second rank alone;
    and their scales.
    """
    shared = local(dtype=torch.float32, at=3, amp=torch.float16, optimizer=plain_sgd)
    for unit in shared.units:
        unit.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    replicate(shared)
    if world().rank == 1:
        weight = shared.units[1].weights()[0]
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf))
    before = [[weight.clone() for weight in unit.weights()] for unit in shared.units]
    shared.step(*own_share(next(whole_batches(torch.float32))))
    stayed = [
        all(torch.equal(*pair) for pair in zip(weights, unit.weights(), strict=True))
        for weights, unit in zip(before, shared.units, strict=True)
    ]
    return stayed, scales(shared)


def test_an_overflow_on_one_rank_skips_its_unit_on_all() -> None:
    for stayed, own_scales in on_both(overflowing):
        assert stayed == [False, True, False]
        assert own_scales == [2.0**8, 2.0**7, 2.0**8]


def steps_refused() -> list[str]:
    shared = local("plain")
    replicate(shared)
    batch = own_share(next(whole_batches()))
    texts = []
    for attempt in (
        lambda: replicate(shared),
        lambda: layerwise.distribute(shared),
        lambda: shared.step(*batch, update=world().first),
    ):
        try:
            attempt()
        except InvalidInput as refusal:
            texts.append(str(refusal))
    shared.step(*batch)
    return [*texts, str(alike_everywhere(shared))]


def test_steps_that_cannot_be_shared_are_refused_on_all_ranks() -> None:
    for texts in on_both(steps_refused):
        assert len(texts) == 4, texts
        assert "Cannot replicate the learner: it is distributed" in texts[0]
        assert "Cannot distribute the learner: it is already" in texts[1]
        assert "Make the same steps on all ranks" in texts[2]
        assert texts[3] == "True"


def in_a_grid(folder: Path) -> Any:
    """The difference of two replicas on two ranks each; and a run, which another goes on with."""
    shared = local(at=3)
    whole = copy.deepcopy(shared)
    layerwise.distribute(shared, "2,1", replicas=2)
    for images, labels in whole_batches():
        parts = list(zip(images.tensor_split(2), labels.tensor_split(2), strict=True))
        for number, part in enumerate(parts, start=1):
            own, own_labels = (each.tensor_split(2)[world().rank // 2] for each in part)
            shared.step(own, own_labels, update=number == 2)
            whole.step(*part, update=number == 2)
    with layerwise.whole(shared) as first:
        value = difference(shared, whole) if first else 0.0
    parallel = replace(RUN, rule="parallel", rule_options=Options({"micro_batches": 2}))
    path = folder / "grid"
    return [
        value,
        carry_out(parallel, path, stop_after=2, replicas=2),
        carry_out(parallel, path, resume=True, replicas=2, ranks="4,3"),
        carry_out(parallel, folder / "refused", replicas=3),
    ]


@pytest.mark.slow
def test_replicas_on_several_ranks_each(tmp_path: Path) -> None:
    carry_out(replace(RUN, rule_options=Options({"micro_batches": 2})), tmp_path / "alone")
    wanted = weights_of(tmp_path / "alone")
    for rank, results in enumerate(on_ranks(in_a_grid, tmp_path, size=4)):
        value, stopped, result, refused = results
        assert value < EXACT, rank
        assert "all is saved" in stopped
        assert [entry["units"] for entry in result["ranks"]] == [[0, 3], [4, 6]] * 2
        assert "Cannot have 3 replicas on 4 ranks" in refused
    for key, weight in weights_of(tmp_path / "grid").items():
        torch.testing.assert_close(weight, wanted[key], rtol=1e-2, atol=1e-4)
    scores = scores_of_epochs(tmp_path / "grid")
    assert scores == pytest.approx(scores_of_epochs(tmp_path / "alone"), rel=1e-3)


CPU = Execution(device="cpu", cpu_threads=1, keep_memory=False)
RUN = Run(
    model="vgg8b",
    width=1 / 16,
    train_images=56,
    batch_size=16,
    epochs=2,
    optimizer="sgd",
    lr=0.01,
)


def carry_out(
    run: Run, path: Path, resume: bool = False, stop_after: int = 0, **how: Any
) -> dict[str, Any] | str:
    """A run's result, or a sentence if it was refused or stopped."""
    try:
        progress = StopAfter(stop_after) if stop_after else Progress()
        return train(prepare(run, replace(CPU, **how)), RunFolder(path), resume, progress)
    except (InvalidInput, Interrupted) as ending:
        return str(ending)


def behind_frozen(folder: Path) -> Run:
    """A run whose frozen units are trained ones; what leaves them is kept."""
    trained = str(folder / "alone" / WEIGHTS)
    return replace(RUN, weights=trained, train_from="2", augment=False)


def carried_out(folder: Path) -> list[Any]:
    """Runs by replicas: whole; stopped, and gone on with; begun alone."""
    dropping = replace(RUN, dropout=0.2)
    behind = behind_frozen(folder)
    carry_out(behind, folder / "behind", stop_after=5, replicas=2)
    carry_out(behind, folder / "behind", resume=True, replicas=2)
    return [
        carry_out(RUN, folder / "shared", replicas=2),
        carry_out(dropping, folder / "dropping", replicas=2),
        carry_out(dropping, folder / "stopped", stop_after=5, replicas=2),
        carry_out(dropping, folder / "stopped", resume=True, replicas=2),
        carry_out(RUN, folder / "begun-alone", resume=True, replicas=2),
        carry_out(RUN, folder / "begun-shared", stop_after=2, replicas=2),
        carry_out(replace(RUN, batch_size=3), folder / "refused", replicas=2),
        carry_out(RUN, folder / "refused", replicas=3),
        carry_out(RUN, folder / "refused", replicas=0),
        carry_out(replace(RUN, rule="sequential"), folder / "refused", replicas=2),
        carry_out(RUN, folder / "refused"),
    ]


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / WEIGHTS)


def scores_of_epochs(path: Path) -> list[float]:
    """Losses of units, in training and in evaluation, and accuracies of the network."""
    records = RunFolder(path).log()
    names = ("loss", "val_loss")
    losses = [unit[name] for record in records for unit in record["units"] for name in names]
    return [*losses, *(record["val_accuracy"] + record["test_accuracy"] for record in records)]


def test_runs_of_replicas_are_those_of_one_process(tmp_path: Path) -> None:
    """Also when they are stopped and go on with another number of replicas."""
    carry_out(RUN, tmp_path / "alone")
    carry_out(behind_frozen(tmp_path), tmp_path / "behind-alone")
    carry_out(RUN, tmp_path / "begun-alone", stop_after=6)
    first, second = on_ranks(carried_out, tmp_path, patience=200.0)
    carry_out(RUN, tmp_path / "begun-shared", resume=True)

    pairs = [(name, "alone") for name in ("shared", "begun-alone", "begun-shared")]
    for name, other in [*pairs, ("behind", "behind-alone")]:
        wanted = weights_of(tmp_path / other)
        for key, weight in weights_of(tmp_path / name).items():
            torch.testing.assert_close(weight, wanted[key], rtol=1e-2, atol=1e-4)
        scores = scores_of_epochs(tmp_path / name)
        assert scores == pytest.approx(scores_of_epochs(tmp_path / other), rel=1e-3)
    stopped, unstopped = (weights_of(tmp_path / name) for name in ("stopped", "dropping"))
    assert all(torch.equal(weight, unstopped[key]) for key, weight in stopped.items())

    assert first[0] == second[0]
    assert first[0]["replicas"] == 2
    for texts in (first, second):
        assert "stopped after 1 epoch and" in texts[2]
        assert "Cannot share batches of 3 images among 2 replicas" in texts[6]
        assert "Cannot use --replicas 3 on 2 ranks: each replica is a rank" in texts[7]
        assert "Cannot use replicas 0: it is out of range. Give 1 or more" in texts[8]
        assert "'sequential' with --replicas 2: only some rules share batches" in texts[9]
        assert "Give --replicas 2, which share every batch, or --rule parallel" in texts[10]
    assert not (tmp_path / "refused").exists()
