"""Fine-tuning in little memory: local against global fine-tuning, from one network's pretrained
weights, at equal epochs.

For every method, rates are tried with one seed and chosen by held-out images; then every seed is
trained at the chosen rate. Trainings that a file of results has already are left out.

    layerwise train resnet18 --data cifar100 --width 0.25 --image-size 16 --rule global \
        --epochs 12 --crop-padding 2 --lr 1e-3 --decay-milestones cosine --val-fraction 0 --amp \
        --output PRETRAINED
    python benchmarks/fine_tuning.py PRETRAINED --data-dir data --csv results/fine-tuning.csv
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import cos, pi
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from layerwise.core.factories import scale_rate
from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.data import Splits
from layerwise.memory.accounting import measured, persistent_bytes
from layerwise.profiling.predict import predict_steps
from layerwise.rules import RULES
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.device import apply_execution
from layerwise.training.evaluate import accuracy
from layerwise.training.machine import describe_machine
from layerwise.training.networks import build_network, load_network
from layerwise.training.prepare import prepare
from tables import fill_table

RATES = (1e-3, 3e-3)
OUTPUT = "output"  # the new classifier's path in the network


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        words: name in the table.
        at: where units end.
        rule: order of updates.
        below: rate of a unit relative to the unit behind it.
        new: rate of new layers, heads and the classifier, relative to that of pretrained ones.
        options: of ``localize``.
    """

    words: str
    at: Any = "block"
    rule: str = "simultaneous"
    below: float = 1.0
    new: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def learner(self, network: nn.Module, rate: float, seed: int, splits: Splits) -> Learner:
        learner = localize(
            network,
            torch.zeros(2, splits.channels, splits.image_size, splits.image_size),
            splits.num_classes,
            at=self.at,
            optimizer=lambda weights: torch.optim.Adam(weights, lr=rate, fused=True),
            seed=seed,
            head_lr_factor=1.0 if self.at == 1 else self.new,  # one unit has no head
            check=False,
            **{"loss": "pred", **self.options},
        )
        for unit in learner.units:
            if unit.optimizer is not None:
                factor = self.below ** (len(learner.units) - 1 - unit.index)
                scale_rate(unit.optimizer, unit.piece.parameters(), factor)
        if learner.units[-1].optimizer is not None:
            new = network.get_submodule(OUTPUT).parameters()
            scale_rate(learner.units[-1].optimizer, new, self.new)
        return learner


def methods() -> dict[str, Method]:
    """The methods by name."""
    dgl = {"loss": "dgl-cnn"}
    stage = ["stages.0.1", "stages.1.1", "stages.2.1"]
    return {
        "global": Method("global fine-tuning", 1),
        "global-new10": Method("global, classifier at ten times the rate", 1, new=10),
        "checkpointed": Method("global, checkpointed", 1, "checkpointed"),
        "probe": Method("linear probe", options={"output_layer": "separate", "train_from": OUTPUT}),
        "frozen1-global": Method(
            "first stage frozen, global above", stage[:1], options={"train_from": 1}
        ),
        "frozen2-global": Method(
            "two stages frozen, global above", stage[1:2], options={"train_from": 1}
        ),
        "pred": Method("blocks, pred"),
        "predsim": Method("blocks, predsim", options={"loss": "predsim"}),
        "pred-new10": Method("blocks, pred, heads at ten times the rate", new=10),
        "dgl": Method("blocks, dgl-cnn", options=dgl),
        "dgl-below": Method("blocks, dgl-cnn, 0.7 of the rate below", below=0.7, options=dgl),
        "dgl-span2": Method("blocks, dgl-cnn, span 2", options={**dgl, "span": 2}),
        "dgl-span3": Method("blocks, dgl-cnn, span 3", options={**dgl, "span": 3}),
        "pred-span3": Method("blocks, pred, span 3", options={"span": 3}),
        "auglocal": Method("blocks, auglocal", options={"loss": "auglocal"}),
        "look-ahead": Method("blocks, look-ahead", options={"loss": "look-ahead"}),
        "look-ahead-span2": Method(
            "blocks, look-ahead, span 2", options={"loss": "look-ahead", "span": 2}
        ),
        "stages-pred": Method("stages, pred", stage),
        "stages-dgl": Method("stages, dgl-cnn", stage, options=dgl),
        "stages-span2": Method("stages, pred, span 2", stage, options={"span": 2}),
        "stages-look-ahead": Method("stages, look-ahead", stage, options={"loss": "look-ahead"}),
        "match": Method("blocks, pred + 1 match", options={"loss": "match"}),
        "match-dgl": Method(
            "blocks, dgl-cnn + 1 match", options={"loss": "match", "head_loss": "dgl-cnn"}
        ),
        "frozen1-match": Method(
            "first stage frozen, blocks, pred + 1 match",
            options={"loss": "match", "train_from": "stages.1.0"},
        ),
        "frozen1-dgl": Method(
            "first stage frozen, blocks, dgl-cnn", options={**dgl, "train_from": "stages.1.0"}
        ),
        "frozen1-dgl-span2": Method(
            "first stage frozen, blocks, dgl-cnn, span 2",
            options={**dgl, "train_from": "stages.1.0", "span": 2},
        ),
        "frozen1-dgl-span3": Method(
            "first stage frozen, blocks, dgl-cnn, span 3",
            options={**dgl, "train_from": "stages.1.0", "span": 3},
        ),
        "frozen1-stages": Method(
            "first stage frozen, stages, pred", stage, options={"train_from": 1}
        ),
        "frozen1-stages-span2": Method(
            "first stage frozen, stages, pred, span 2", stage, options={"train_from": 1, "span": 2}
        ),
        "frozen1-pred": Method(
            "first stage frozen, blocks, pred", options={"train_from": "stages.1.0"}
        ),
        "frozen1-two": Method(
            "first stage frozen, two units above, pred",
            stage[:2],
            options={"train_from": 1},
        ),
        "frozen1-three": Method(
            "first stage frozen, three units above, pred",
            ["stages.0.1", "stages.1.0", "stages.2.0"],
            options={"train_from": 1},
        ),
        "frozen1-halves": Method(
            "first stage frozen, halves above, pred",
            ["stages.0.1", "stages.2.0"],
            options={"train_from": 1},
        ),
        "two-pred": Method("halves, pred", ["stages.1.1"]),
        "two-dgl": Method("halves, dgl-cnn", ["stages.1.1"], options=dgl),
        "frozen1-halves-dgl": Method(
            "first stage frozen, halves above, dgl-cnn",
            ["stages.0.1", "stages.2.0"],
            options={**dgl, "train_from": 1},
        ),
    }


def pretrained(folder: Path, run: Run, splits: Splits) -> nn.Module:
    """The run's network with the weights of another, whose classifier is left out."""
    source, _ = load_network(RunFolder(folder), best=False)
    torch.manual_seed(run.seed)
    network = build_network(run, splits)
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith(f"{OUTPUT}.")}
    missing, unknown = network.load_state_dict(weights, strict=False)
    assert not unknown
    assert all(name.startswith(f"{OUTPUT}.") for name in missing)
    return network


def fine_tune(method: Method, rate: float, seed: int, arguments: Any) -> dict[str, Any]:
    """Fine-tune once; accuracies in percent, seconds of one core, peak of memory in bytes."""
    run = describe_run(seed, arguments)
    execution = Execution(data_dir=arguments.data_dir, device="cpu", cpu_threads=1)
    prepared = prepare(run, execution)
    apply_execution(prepared.device, execution)
    splits = prepared.load_data()
    learner = method.learner(pretrained(arguments.pretrained, run, splits), rate, seed, splits)
    began = time.process_time()
    for _ in RULES[method.rule].order(
        learner, splits.train, arguments.epochs, lambda done: (1 + cos(pi * done)) / 2
    ):
        pass
    seconds = time.process_time() - began
    assert splits.validation is not None
    return {
        "val_accuracy": accuracy(learner.model, splits.validation, None),
        "test_accuracy": accuracy(learner.model, splits.test, None),
        "seconds": seconds,
        "units": len(learner.units),
    }


def memory(method: Method, arguments: Any) -> dict[str, int]:
    """Peak of memory of a step, counted whole, predicted and measured, in bytes."""
    run = describe_run(0, arguments)
    prepared = prepare(run, Execution(data_dir=arguments.data_dir, device="cpu", cpu_threads=1))
    splits = prepared.load_data()
    learner = method.learner(pretrained(arguments.pretrained, run, splits), 1e-3, 0, splits)
    steps = predict_steps(method.rule, learner, run.batch_size, {})
    ticks = RULES[method.rule].order(learner, splits.train, 1, lambda done: 1.0)
    next(ticks)  # the first step has no state of the optimizer yet
    kept = persistent_bytes(learner)
    with measured(prepared.device) as peak:
        next(ticks)
    return {
        "predicted_bytes": max(max(step.peaks().values()) for step in steps),
        "measured_bytes": kept + peak.transient_bytes,
    }


def describe_run(seed: int, arguments: Any) -> Run:
    source = RunFolder(arguments.pretrained).run()
    return Run(
        model=source.model,
        model_options=source.model_options,
        hierarchy=source.hierarchy,
        width=source.width,
        data=arguments.data,
        image_size=source.image_size,
        crop_padding=source.crop_padding,
        train_images=arguments.images,
        val_fraction=0.1,
        batch_size=arguments.batch_size,
        seed=seed,
    )


class Results:
    """Results that are kept in a file of lines, so that none is computed twice.

    Args:
        settings: those that all results of the file have.
        compute: whether those that are missing are computed.

    Raises:
        SystemExit: results of the file have other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], compute: bool) -> None:
        self.path, self.settings, self.compute = path, settings, compute
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {result["key"]: result for result in map(json.loads, lines)}
        for result in self.known.values():
            if result["settings"] != settings:
                sys.exit(
                    f"Cannot go on with {path}: its results are of {result['settings']}, not of "
                    f"{settings}. Give another file by --results."
                )

    def get(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        if key not in self.known and self.compute:
            facts = describe_machine(torch.device("cpu"))
            self.known[key] = {
                "key": key,
                "settings": self.settings,
                "machine": facts["machine"]["device"],
                "commit": facts["commit"],
                **compute(),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
            print(json.dumps(self.known[key]), flush=True)
        return self.known.get(key)


def rows(arguments: Any) -> Iterator[dict[str, Any]]:
    """A row per method: the chosen rate, accuracies over seeds, costs."""
    settings = {
        "pretrained": RunFolder(arguments.pretrained).facts_digest(),
        "data": arguments.data,
        "images": arguments.images,
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
    }
    results = Results(arguments.results, settings, not arguments.table_only)
    for name in arguments.methods:
        method = methods()[name]

        def trained(rate: float, seed: int, name: str = name, method: Method = method) -> Any:
            compute = partial(fine_tune, method, rate, seed, arguments)
            return results.get(f"{name} {rate:g} {seed}", compute)

        tried = {rate: trained(rate, arguments.seeds[0]) for rate in arguments.rates}
        tried = {rate: result for rate, result in tried.items() if result}
        costs = results.get(f"{name} memory", partial(memory, method, arguments))
        if tried and costs:
            rate = max(tried, key=lambda rate: tried[rate]["val_accuracy"])
            each = list(filter(None, (trained(rate, seed) for seed in arguments.seeds)))
            yield {"method": method.words, **summary(rate, list(tried), each, costs)}


def summary(
    rate: float, tried: list[float], each: list[dict[str, Any]], costs: dict[str, int]
) -> dict[str, Any]:
    """Means over seeds, and the sample deviation of the test accuracy."""
    accuracies = [result["test_accuracy"] for result in each]
    return {
        "units": each[0]["units"],
        "rate": rate,
        "rates_tried": " ".join(f"{value:g}" for value in tried),
        "seeds": len(each),
        "val_accuracy": round(mean(result["val_accuracy"] for result in each), 2),
        "test_accuracy": round(mean(accuracies), 2),
        "deviation": round(stdev(accuracies), 2) if len(each) > 1 else "",
        "predicted_mb": round(costs["predicted_bytes"] / 1e6, 1),
        "measured_mb": round(costs["measured_bytes"] / 1e6, 1),
        "seconds": round(mean(result["seconds"] for result in each), 1),
        "machine": ", ".join(sorted({result["machine"] for result in each})),
        "commit": ", ".join(sorted({result["commit"] or "" for result in each})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pretrained", type=Path, help="folder of a finished run")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("fine-tuning.jsonl"))
    parser.add_argument(
        "--table-only", action="store_true", help="train nothing: rows of what there is"
    )
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    table = []
    for row in rows(arguments):
        table.append(row)
        print(*row.values(), sep="  ", flush=True)
    if arguments.csv:
        fill_table(arguments.csv, table, ("method",))


if __name__ == "__main__":
    main()
