"""Throughput and memory of 1 to 64 devices, simulated from costs measured on one.

Four ways to train one network on several devices:

- ``units``: units on devices, each learning from its own loss; features travel forward alone. Where
  there are more devices than units, whole chains are replicated and average their gradients.
- ``replicas``: every device has the whole network and a share of the batch, and learns locally;
  each unit's gradients are averaged while later units compute.
- ``data parallel``: the same of global training, averaged while earlier layers go backward.
- ``gpipe`` and ``1f1b``: stages of global training on devices, in micro-batches, four per stage,
  flushed every batch.

The batch is the same for all. Seconds and bytes of every unit are measured here with one thread;
they grow with the number of images. ``--speed 100`` is a device a hundred times faster. A link has
a bandwidth in either direction and a latency. A device computes one thing at a time, in a fixed
order; a link carries one message at a time. An average over N devices is a ring's: 2 (N − 1) / N of
its bytes pass every link.

    python benchmarks/devices.py vgg16 --csv results/devices.csv --figure docs/images/devices.svg
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import layerwise
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.core.unit import Unit, detached
from layerwise.losses import Targets
from tables import fill_table

Key = tuple[object, ...]
Programs = Mapping[int, Sequence["Task"]]  # by device, in the order it computes them
NETWORK = -1  # the device that stands for all links of an average
STATES = 4  # numbers kept for each weight: itself, its gradient and Adam's two
BUFFERS = 2  # features that wait before a device's first unit
PER_STAGE = 4  # micro-batches of GPipe and 1F1B
STEPS = 12  # batches simulated; the second half is counted, when every device has its work


@dataclass(frozen=True)
class Cost:
    """What a unit costs. Seconds and bytes of features are for one image.

    Attributes:
        forward, backward: of global training. local: of a local step before its update.
        update: seconds of an update of its weights, whatever the batch; local_update: with those of
            its head.
        feature: bytes that leave it, shortcuts among them.
        saved: bytes kept for the backward pass of global training, by storage, since neighbours
            keep the feature between them once; local_saved: bytes kept for that of a local step.
        weights: bytes of its weights; head: of its head's.
    """

    forward: float
    backward: float
    local: float
    update: float
    local_update: float
    feature: int
    saved: Mapping[int, int]
    local_saved: int
    weights: int
    head: int


@dataclass(frozen=True)
class Link:
    """A connection of two devices: bytes per second in either direction, and seconds a message."""

    bandwidth: float
    latency: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    def average(self, size: float, devices: int) -> float:
        """Seconds of a ring's average over some devices."""
        turns = 2 * (devices - 1)
        return turns * self.seconds(size / devices) if devices > 1 else 0.0


@dataclass(frozen=True)
class Task:
    """Something that a device computes once what it needs is there.

    Attributes:
        needs: tasks, with the bytes that travel if the task ran on another device.
    """

    key: Key
    seconds: float
    needs: tuple[tuple[Key, float], ...] = ()


def simulate(programs: Programs, link: Link) -> dict[Key, float]:
    """The time at which every task ends.

    Raises:
        ValueError: tasks wait for one another.
    """
    home = {task.key: device for device, tasks in programs.items() for task in tasks}
    ends: dict[Key, float] = {}
    free = dict.fromkeys(programs, 0.0)
    links: dict[tuple[int, int], float] = {}
    waiting = {device: list(reversed(tasks)) for device, tasks in programs.items()}
    while any(waiting.values()):
        ready = [
            device
            for device, tasks in waiting.items()
            if tasks and all(key in ends for key, _ in tasks[-1].needs)
        ]
        if not ready:
            raise ValueError("tasks wait for one another")
        for device in ready:
            task = waiting[device].pop()
            start = free[device]
            for key, size in task.needs:
                start = max(start, arrival(ends[key], size, (home[key], device), links, link))
            ends[task.key] = free[device] = start + task.seconds
    return ends


def arrival(
    sent: float, size: float, way: tuple[int, int], links: dict[tuple[int, int], float], link: Link
) -> float:
    """The time at which a message is there; links carry one at a time."""
    if way[0] == way[1] or NETWORK in way or not size:
        return sent
    links[way] = max(sent, links.get(way, 0.0)) + link.seconds(size)
    return links[way]


def partition(seconds: Sequence[float], parts: int) -> list[range]:
    """Consecutive units in so many parts, the largest sum as small as can be."""
    count = len(seconds)
    sums = [0.0]
    for value in seconds:
        sums.append(sums[-1] + value)
    best = [[(sums[end], 0) for end in range(count + 1)]]
    for part in range(1, parts):
        best.append(
            [
                min(
                    (
                        (max(best[-1][cut][0], sums[end] - sums[cut]), cut)
                        for cut in range(part, end)
                    ),
                    default=(float("inf"), 0),
                )
                for end in range(count + 1)
            ]
        )
    ends = [count]
    for part in range(parts - 1, 0, -1):
        ends.append(best[part][ends[-1]][1])
    return [range(*pair) for pair in zip([0, *reversed(ends[1:])], reversed(ends), strict=True)]


@dataclass(frozen=True)
class Outcome:
    """Images per second of all devices together, and the most bytes that one of them holds."""

    images: float
    memory: float


def steady(ends: Mapping[Key, float], last: Sequence[Key], batch: int) -> float:
    """Images per second over the second half of the batches; ``last`` ends each of them."""
    half = len(last) // 2
    return batch * (len(last) - 1 - half) / (ends[last[-1]] - ends[last[half]])


def kept(costs: Sequence[Cost]) -> int:
    """Bytes that neighbouring units keep for a backward pass through all of them, for one image."""
    storages: dict[int, int] = {}
    for cost in costs:
        storages |= cost.saved
    return sum(storages.values())


def states(costs: Sequence[Cost], heads: bool) -> float:
    return STATES * sum(cost.weights + (cost.head if heads else 0) for cost in costs)


def units_on_devices(costs: Sequence[Cost], devices: int, batch: int, link: Link) -> Outcome:
    """Units on devices; beyond as many as there are units, several chains."""
    chain = max(size for size in range(1, min(devices, len(costs)) + 1) if devices % size == 0)
    chains, images = devices // chain, batch / (devices // chain)
    parts = partition([cost.local * images + cost.local_update for cost in costs], chain)
    programs: dict[int, list[Task]] = {device: [] for device in (*range(chain), NETWORK)}
    for step in range(STEPS):
        for device, part in enumerate(parts):
            programs[device] += local_tasks(costs, part, step, images, device, len(parts))
            programs[NETWORK] += averages(costs, part, step, chains, link)
    ends = simulate(programs, link)
    last = [(step, parts[-1][-1], "learn") for step in range(STEPS)]
    return Outcome(
        steady(ends, last, batch),
        max(
            states([costs[unit] for unit in part], heads=True)
            + images * max(costs[unit].local_saved for unit in part)
            + BUFFERS * images * (costs[part[0] - 1].feature if part[0] else 0)
            for part in parts
        ),
    )


def local_tasks(
    costs: Sequence[Cost], part: range, step: int, images: float, device: int, parts: int
) -> Iterator[Task]:
    """A batch's tasks on the device that has a part of the units.

    The features of its last unit travel before the unit learns.
    """
    for unit in part:
        cost = costs[unit]
        needs: list[tuple[Key, float]] = [((step - 1, unit, "average"), 0.0)] if step else []
        if unit:
            before = costs[unit - 1]
            needs.append(((step, unit - 1, "forward"), images * before.feature))
        if unit == part[-1] and device + 1 < parts and step >= BUFFERS:
            needs.append(((step - BUFFERS, unit + 1, "forward"), 0.0))  # room in its buffers
        yield Task((step, unit, "forward"), images * cost.forward, tuple(needs))
        rest = images * max(cost.local - cost.forward, 0.0) + cost.local_update
        yield Task((step, unit, "learn"), rest, (((step, unit, "forward"), 0.0),))


def averages(
    costs: Sequence[Cost], part: range, step: int, devices: int, link: Link, heads: bool = True
) -> Iterator[Task]:
    """The averages of each unit's gradients over devices, one after the other."""
    for unit in part:
        size = costs[unit].weights + (costs[unit].head if heads else 0)
        yield Task(
            (step, unit, "average"), link.average(size, devices), (((step, unit, "learn"), 0.0),)
        )


def replicas(costs: Sequence[Cost], devices: int, batch: int, link: Link) -> Outcome:
    """Whole networks that learn locally from a share of the batch; one of them is simulated."""
    images, everything = batch / devices, range(len(costs))
    programs: dict[int, list[Task]] = {0: [], NETWORK: []}
    for step in range(STEPS):
        programs[0] += local_tasks(costs, everything, step, images, 0, 1)
        programs[NETWORK] += averages(costs, everything, step, devices, link)
    ends = simulate(programs, link)
    last = [(step, len(costs) - 1, "learn") for step in range(STEPS)]
    memory = states(costs, heads=True) + images * max(cost.local_saved for cost in costs)
    return Outcome(steady(ends, last, batch), memory)


def data_parallel(costs: Sequence[Cost], devices: int, batch: int, link: Link) -> Outcome:
    """Global training of whole networks by a share of the batch; one of them is simulated."""
    images, last_unit = batch / devices, len(costs) - 1
    programs: dict[int, list[Task]] = {0: [], NETWORK: []}
    for step in range(STEPS):
        for unit, cost in enumerate(costs):
            averaged = (((step - 1, unit, "average"), 0.0),) if step else ()
            programs[0].append(Task((step, unit, "forward"), images * cost.forward, averaged))
        for unit in reversed(range(len(costs))):
            seconds = images * costs[unit].backward + costs[unit].update
            programs[0].append(Task((step, unit, "learn"), seconds))
            programs[NETWORK] += averages(
                costs, range(unit, unit + 1), step, devices, link, heads=False
            )
    ends = simulate(programs, link)
    last = [(step, last_unit, "forward") for step in range(STEPS)]
    memory = states(costs, heads=False) + images * kept(costs)
    return Outcome(steady(ends, last, batch), memory)


def gpipe(costs: Sequence[Cost], devices: int, batch: int, link: Link) -> Outcome:
    """All forward passes, then all backward passes (Huang et al. 2019), without recomputing."""
    return pipeline(costs, devices, batch, link, lambda stage, stages, micro: micro)


def one_forward_one_backward(
    costs: Sequence[Cost], devices: int, batch: int, link: Link
) -> Outcome:
    """As few batches under way as fill the pipeline (Narayanan et al. 2019), with a flush."""
    return pipeline(costs, devices, batch, link, lambda stage, stages, micro: stages - stage)


def pipeline(
    costs: Sequence[Cost], devices: int, batch: int, link: Link, under_way: Any
) -> Outcome:
    """Stages in micro-batches; beyond as many as there are units, several pipelines.

    Args:
        under_way: function of stage, stages and micro-batches that gives how many micro-batches a
            stage has gone forward with before it goes back with the first.
    """
    stages = max(size for size in range(1, min(devices, len(costs)) + 1) if devices % size == 0)
    images = batch / (devices // stages)
    micro = PER_STAGE * stages if stages > 1 else 1
    parts = partition(
        [images * (cost.forward + cost.backward) + cost.update for cost in costs], stages
    )
    programs: dict[int, list[Task]] = {stage: [] for stage in (*range(stages), NETWORK)}
    for step in range(STEPS):
        for stage, part in enumerate(parts):
            first = min(under_way(stage, stages, micro), micro)
            programs[stage] += stage_tasks(costs, parts, stage, step, images / micro, micro, first)
            size = sum(costs[unit].weights for unit in part)
            programs[NETWORK].append(
                Task(
                    (step, stage, "average"),
                    link.average(size, devices // stages),
                    (((step, stage, "update"), 0.0),),
                )
            )
    ends = simulate(programs, link)
    last = [(step, 0, "update") for step in range(STEPS)]
    held = [
        states([costs[unit] for unit in part], heads=False)
        + images
        * min(under_way(stage, stages, micro), micro)
        / micro
        * kept([costs[unit] for unit in part])
        for stage, part in enumerate(parts)
    ]
    return Outcome(steady(ends, last, batch), max(held))


def stage_tasks(
    costs: Sequence[Cost],
    parts: Sequence[range],
    stage: int,
    step: int,
    images: float,
    micro: int,
    first: int,
) -> Iterator[Task]:
    """A batch's tasks of a stage: ``first`` passes forward, then one back, one forward in turn."""
    part = parts[stage]
    forward = images * sum(costs[unit].forward for unit in part)
    backward = images * sum(costs[unit].backward for unit in part)
    entering = images * (costs[part[0] - 1].feature if stage else 0)
    leaving = images * costs[part[-1]].feature

    def ahead(index: int) -> Task:
        needs: list[tuple[Key, float]] = [((step - 1, stage, "average"), 0.0)] if step else []
        if stage:
            needs.append(((step, stage - 1, "forward", index), entering))
        return Task((step, stage, "forward", index), forward, tuple(needs))

    def back(index: int) -> Task:
        needs: list[tuple[Key, float]] = [((step, stage, "forward", index), 0.0)]
        if stage + 1 < len(parts):
            needs.append(((step, stage + 1, "backward", index), leaving))
        return Task((step, stage, "backward", index), backward, tuple(needs))

    yield from map(ahead, range(first))
    for index in range(micro):
        yield back(index)
        if first + index < micro:
            yield ahead(first + index)
    yield Task((step, stage, "update"), sum(costs[unit].update for unit in part))


WAYS = {
    "units": units_on_devices,
    "replicas": replicas,
    "data parallel": data_parallel,
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
}
LABELS = {
    "units": "units on devices",
    "replicas": "replicas of local training",
    "data parallel": "data parallel, global",
    "gpipe": "GPipe, global",
    "1f1b": "1F1B, global",
}


def measured_costs(
    model: str, loss: str, at: str, width: float, batch: int, repeats: int
) -> list[Cost]:
    """Costs of every unit, from random images of 32 pixels; medians of some repeats."""
    network = layerwise.create_model(model, width=width, image_size=32)
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    learner = layerwise.localize(network, images[:2], 10, loss=loss, at=at)
    set_memory_format(learner, "channels-last")
    learner.train()
    activations: tuple[Any, ...] = (images.contiguous(memory_format=torch.channels_last),)
    costs = []
    for unit in learner.units:
        targets = Targets(labels, 10)
        costs.append(cost_of(unit, activations, targets, batch, repeats))
        activations, _ = unit.step(activations, targets, 0)
    with_chain = zip(costs, saved_in_chain(learner, images), strict=True)
    return [
        replace(cost, saved={storage: size // batch for storage, size in saved.items()})
        for cost, saved in with_chain
    ]


def cost_of(
    unit: Unit, entering: tuple[Any, ...], targets: Targets, batch: int, repeats: int
) -> Cost:
    """A unit's costs; what it keeps in global training is left out."""
    weights, timed = unit.parameters(), []
    for _ in range(repeats + 2):  # the first two map memory and make the optimizer's state
        inputs = tuple(
            value.detach().requires_grad_(unit.index > 0) if isinstance(value, Tensor) else value
            for value in entering
        )
        times = [perf_counter()]
        left = distinct(unit.piece(*inputs))
        times.append(perf_counter())
        torch.autograd.backward(
            [feature for feature in left if feature.requires_grad],
            [torch.ones_like(feature) for feature in left if feature.requires_grad],
        )
        times.append(perf_counter())
        unit.optimizer.step()  # type: ignore[union-attr]
        times.append(perf_counter())
        unit.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        size = sum(feature.numel() * feature.element_size() for feature in left)
        del left
        times.append(perf_counter())
        unit.step(detached(inputs), targets, 1, update=False)
        for weight, gradient in unit.sums.items():
            weight.grad = gradient
        times.append(perf_counter())
        unit.optimizer.step()  # type: ignore[union-attr]
        times.append(perf_counter())
        unit.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        unit.zero_grad()
        timed.append([after - before for before, after in pairwise(times)])
    forward, backward, update, _, local, local_update = map(median, zip(*timed[2:], strict=True))
    own = {id(weight) for weight in unit.piece.parameters()}
    sizes = {id(weight): weight.numel() * weight.element_size() for weight in weights}
    storages, _ = saved_storages(lambda: unit.evaluate(inputs, targets), weights)
    return Cost(
        forward / batch,
        backward / batch,
        local / batch,
        update,
        local_update,
        size // batch,
        {},
        sum(storages.values()) // batch,
        sum(size for key, size in sizes.items() if key in own),
        sum(size for key, size in sizes.items() if key not in own),
    )


def distinct(activations: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among activations, each once."""
    return list({id(value): value for value in activations if isinstance(value, Tensor)}.values())


def saved_in_chain(learner: Learner, images: Tensor) -> list[dict[int, int]]:
    """Bytes that each unit keeps of one forward pass through all of them, by storage."""
    activations: tuple[Any, ...] = (images.contiguous(memory_format=torch.channels_last),)
    found = []
    for unit in learner.units:
        storages, activations = saved_storages(
            partial(unit.piece, *activations), list(unit.piece.parameters())
        )
        found.append(storages)
    return found


def saved_storages(
    compute: Callable[[], Any], weights: Sequence[Tensor]
) -> tuple[dict[int, int], Any]:
    """Bytes that autograd keeps for the backward pass, by storage, without weights; the result."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    for weight in weights:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return kept, result


def faster(costs: Sequence[Cost], speed: float) -> list[Cost]:
    """The same units on a device that is so many times faster."""
    return [
        replace(
            cost,
            forward=cost.forward / speed,
            backward=cost.backward / speed,
            local=cost.local / speed,
            update=cost.update / speed,
            local_update=cost.local_update / speed,
        )
        for cost in costs
    ]


def lines(
    model: str, costs: Sequence[Cost], devices: Sequence[int], batch: int, link: Link
) -> Iterator[dict[str, Any]]:
    """A line per way and number of devices, against global training on one device."""
    alone = data_parallel(costs, 1, batch, link)
    for way, outcome_of in WAYS.items():
        for count in devices:
            outcome = outcome_of(costs, count, batch, link)
            own = outcome_of(costs, 1, batch, link)
            yield {
                "model": model,
                "way": way,
                "devices": count,
                "images_per_second": round(outcome.images, 1),
                "of_global_on_one": round(outcome.images / alone.images, 3),
                "of_itself_on_one": round(outcome.images / own.images, 3),
                "share_of_ideal": round(outcome.images / own.images / count, 3),
                "bytes_per_device": round(outcome.memory),
                "memory_of_global_on_one": round(outcome.memory / alone.memory, 3),
            }


def draw(table: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    columns = (
        ("of_global_on_one", "images per second"),
        ("memory_of_global_on_one", "memory of a device"),
    )
    for panel, (column, words) in zip(panels, columns, strict=True):
        for way in WAYS:
            chosen = [line for line in table if line["way"] == way]
            panel.plot(
                [line["devices"] for line in chosen],
                [line[column] for line in chosen],
                marker="o",
                label=LABELS.get(way, way),
            )
        panel.set(xlabel="devices", ylabel=f"{words},\nrelative to global training on one")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["vgg16", "resnet18"], help="networks")
    parser.add_argument("--loss", default="pred", help="local loss (default: pred)")
    parser.add_argument("--at", default="layer", help="where units end (default: layer)")
    parser.add_argument("--width", type=float, default=1.0, help="factor of channel counts")
    parser.add_argument("--measured-batch", type=int, default=32, help="images that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing (default: 5)")
    parser.add_argument("--batch", type=int, default=1024, help="images of a simulated batch")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--speed", type=float, default=1.0, help="of a device, of this one")
    parser.add_argument("--bandwidth", type=float, default=1.25, help="GB/s (default: 1.25)")
    parser.add_argument("--latency", type=float, default=50.0, help="µs a message (default: 50)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parser.add_argument("--figure", type=Path, help="also draw the first network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    link = Link(arguments.bandwidth * 1e9, arguments.latency * 1e-6)
    table = []
    for model in arguments.models:
        costs = measured_costs(
            model,
            arguments.loss,
            arguments.at,
            arguments.width,
            arguments.measured_batch,
            arguments.repeats,
        )
        costs = faster(costs, arguments.speed)
        table += list(lines(model, costs, arguments.devices, arguments.batch, link))
    for line in table:
        print("  ".join(f"{value!s:<14}" for value in line.values()))
    if arguments.csv:
        fill_table(arguments.csv, table, ("model",))
    if arguments.figure:
        title = f"{arguments.models[0]}, {arguments.loss}, a batch of {arguments.batch}, "
        title += f"{arguments.bandwidth:g} GB/s"
        draw(
            [line for line in table if line["model"] == arguments.models[0]],
            arguments.figure,
            title,
        )


if __name__ == "__main__":
    main()
