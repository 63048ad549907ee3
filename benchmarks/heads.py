"""Cost and accuracy of cheaper heads: variants of predsim-lite beside predsim, trained over seeds.

A variant is a loss and where the network is cut. Those that the library does not offer are defined
here. Each is trained by the library's own loop; costs are those of a training step of the network
at full width and 32 pixels, batch 128: multiply-adds over those of a global step (counted),
parameters of the heads, and peak memory counted whole (predicted; nothing is allocated).

    python benchmarks/heads.py --data-dir DATA --runs runs/heads --models resnet18 --seeds 3 \\
        --csv results/heads.csv
"""

import argparse
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.losses import LOSSES, Evaluated, Site, Targets
from layerwise.losses.predsim_lite import PredSimLite
from layerwise.ops.pooling import average, averaging
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import parse_cut
from layerwise.utils.multiply_adds import MultiplyAdds
from layerwise.utils.options import Options
from runs import accuracies, carry_out, finished
from tables import fill_table

GROUPS = 4
RANK = 4  # the low-rank convolution has a rank of so many times fewer than its channels
SAMPLED_SIZE = 4  # windows a side, of each of which a position is sampled
# has no factor in common with the pixels of a window, so that every one of them gets its turn
STRIDE = 7
BATCH, SIZE, CLASSES = 128, 32, 10  # of the step whose cost is given
COUNTED = 4  # images of the step whose multiply-adds are counted; they scale

SMALL = Run(
    data="cifar10",
    width=0.25,
    image_size=16,
    crop_padding=2,
    val_fraction=0.0,
    lr=1e-3,
    train_images=15_000,
    epochs=12,
    output_layer="separate",
)
PUBLISHED = Options(decoder_dim=2048)  # of VGG8b
RUNS = {
    "resnet18": replace(SMALL, model="resnet18", hierarchy="1,1,2,2"),
    "vgg8b": replace(SMALL, model="vgg8b", train_images=10_000, epochs=8, loss_options=PUBLISHED),
    "resnet50": replace(SMALL, model="resnet50", hierarchy="1,1,1,1", train_images=6_000, epochs=8),
}
# channels compared, at a quarter of the width; ResNet18 has few beyond
NARROWED = {"vgg8b": 64, "resnet50": 64}


class Changed(PredSimLite):
    """predsim-lite with something about it changed."""

    def __init__(
        self,
        site: Site,
        *,
        beta: float = 0.99,
        decoder_dim: int = 4096,
        similarity_channels: int | None = 256,
    ) -> None:
        super().__init__(
            site, beta=beta, decoder_dim=decoder_dim, similarity_channels=similarity_channels
        )
        self.change(site)

    @abstractmethod
    def change(self, site: Site) -> None:
        """Change what was made for this site."""


class Replaced(Changed):
    """Another similarity convolution instead of the 3×3 one, if there is one."""

    def change(self, site: Site) -> None:
        for name, module in list(self.sim.named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                self.sim.set_submodule(name, self.instead(module.out_channels))

    @abstractmethod
    def instead(self, channels: int) -> nn.Module:
        """What reads and gives so many channels."""


class Grouped(Replaced):
    """In groups of channels."""

    def instead(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=GROUPS)


class LowRank(Replaced):
    """Of low rank: into few channels, and by a 1×1 convolution into as many as there were."""

    def instead(self, channels: int) -> nn.Module:
        few = max(1, channels // RANK)
        return nn.Sequential(
            nn.Conv2d(channels, few, 3, padding=1, bias=False),
            nn.Conv2d(few, channels, 1, bias=False),
        )


class Separable(Replaced):
    """Of every channel alone, and then a 1×1 convolution that mixes them."""

    def instead(self, channels: int) -> nn.Module:
        alone = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=channels)
        return nn.Sequential(alone, nn.Conv2d(channels, channels, 1, bias=False))


class FewOutputs(Replaced):
    """Into few channels."""

    def instead(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, max(1, channels // RANK), 3, padding=1, bias=False)


class Fixed(Replaced):
    """Never learned: as it was drawn, one for all units of as many channels, which needs no
    gradient and no optimizer state.
    """

    drawn: ClassVar[dict[int, nn.Conv2d]] = {}

    def change(self, site: Site) -> None:
        if site.index == 0:
            Fixed.drawn.clear()
        super().change(site)

    def instead(self, channels: int) -> nn.Module:
        if channels not in Fixed.drawn:
            Fixed.drawn[channels] = nn.Conv2d(
                channels, channels, 3, padding=1, bias=False
            ).requires_grad_(False)
        return Fixed.drawn[channels]


class SampledConvolution(nn.Conv2d):
    """A 3×3 convolution computed at one position of every window of a map, another one from batch
    to batch.
    """

    batches: Tensor

    def __init__(self, channels: int, window: tuple[int, int]) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.window = window
        # saved, so that a resumed run goes on alike
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor) -> Tensor:
        height, width = self.window
        self.batches += int(self.training)
        row, column = divmod(int(self.batches) * STRIDE % (height * width), width)
        return F.conv2d(
            F.pad(features, (1, 1, 1, 1))[:, :, row:, column:], self.weight, stride=self.window
        )


class Sampled(Changed):
    """The similarity convolution reads features as they are, at as many positions as predsim-lite
    has averages.
    """

    def change(self, site: Site) -> None:
        window, _ = averaging(site.shape, SAMPLED_SIZE)
        self.sim.kernel = None
        for name, module in list(self.sim.named_modules()):
            if (
                window is not None
                and isinstance(module, nn.Conv2d)
                and module.kernel_size == (3, 3)
            ):
                self.sim.set_submodule(name, SampledConvolution(module.out_channels, window))

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        pred, correct = self.pred(average(features, self.kernel), targets)
        sim, _ = self.sim.compare(features, targets)
        return Evaluated(self.beta * sim + (1 - self.beta) * pred, correct)


class Shared(Changed):
    """One similarity convolution for all neighbouring units whose maps have one shape; each of them
    trains it.
    """

    latest: tuple[tuple[int, ...], nn.Module] | None = None

    def change(self, site: Site) -> None:
        known = None if site.index == 0 else Shared.latest
        if known is not None and known[0] == site.shape:
            self.sim.transform = known[1]
        Shared.latest = site.shape, self.sim.transform


class EverySecondBatch(Changed):
    """The similarity loss on every second batch only; between, the prediction loss alone, with its
    weight.
    """

    batches: Tensor

    def change(self, site: Site) -> None:
        # saved, so that a resumed run goes on alike
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        self.batches += int(self.training)
        if not self.training or int(self.batches) % 2:
            return super().forward(features, targets)
        loss, correct = self.pred(average(features, self.kernel), targets)
        return Evaluated((1 - self.beta) * loss, correct)


@dataclass(frozen=True)
class Variant:
    """A head and where it is put.

    Attributes:
        name: for the command line.
        loss: the name it is trained under.
        text: in words.
        factory: of its own; None: a loss of the library.
        halved: whether heads are on every second layer only, from the first on; the output layer is
            a unit of its own.
    """

    name: str
    loss: str
    text: str
    factory: Callable[..., nn.Module] | None = None
    halved: bool = False


VARIANTS = (
    Variant("predsim", "predsim", "the paper's"),
    Variant("predsim-lite", "predsim-lite", "features averaged, few channels"),
    Variant("grouped", "grouped", f"predsim-lite, its 3×3 convolution in {GROUPS} groups", Grouped),
    Variant(
        "low-rank",
        "low-rank",
        f"predsim-lite, its 3×3 convolution into 1/{RANK} of the channels and back",
        LowRank,
    ),
    Variant(
        "separable",
        "separable",
        "predsim-lite, its 3×3 convolution channel by channel, then 1×1",
        Separable,
    ),
    Variant(
        "few-outputs",
        "few-outputs",
        f"predsim-lite, its 3×3 convolution into 1/{RANK} of the channels",
        FewOutputs,
    ),
    Variant(
        "fixed",
        "fixed",
        "predsim-lite, its 3×3 convolution as drawn, for all units of as many channels",
        Fixed,
    ),
    Variant(
        "sampled", "sampled", "predsim-lite, similarity of positions sampled, not averaged", Sampled
    ),
    Variant("shared", "shared", "predsim-lite, one convolution for units of one shape", Shared),
    Variant(
        "every-second-batch",
        "every-second-batch",
        "predsim-lite, similarity on every second batch",
        EverySecondBatch,
    ),
    Variant(
        "every-second-layer", "predsim-lite", "predsim-lite on every second layer", halved=True
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds the data set's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/heads"), help="folder of the runs")
    parser.add_argument(
        "--models", nargs="+", choices=RUNS, default=list(RUNS), help="default: all"
    )
    parser.add_argument(
        "--heads", nargs="+", choices=[variant.name for variant in VARIANTS], help="default: all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every variant (default: 3)")
    parser.add_argument("--cpu-threads", type=int, help="threads of each operation on a CPU")
    parser.add_argument(
        "--table-only", action="store_true", help="train nothing: show what there is"
    )
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    LOSSES.update(
        {variant.loss: variant.factory for variant in VARIANTS if variant.factory is not None}
    )
    chosen = [
        variant
        for variant in VARIANTS
        if arguments.heads is None or variant.name in arguments.heads
    ]
    execution = Execution(
        data_dir=arguments.data_dir, cpu_threads=arguments.cpu_threads, eval_every=100
    )
    for seed in range(0 if arguments.table_only else arguments.seeds):
        for model in arguments.models:
            for variant in chosen:
                carry_out(run_of(model, variant, seed), arguments.runs, execution)
    table = [line for model in arguments.models for line in lines(model, chosen, arguments)]
    for line in table:
        print("  ".join(str(value) for value in line.values()))
    if arguments.csv:
        fill_table(arguments.csv, table, ("model", "head"))


def run_of(model: str, variant: Variant, seed: int) -> Run:
    base = RUNS[model]
    names = [unit.name for unit in learner_of(base, "layer").units]
    at = ",".join(names[:-1:2]) if variant.halved else "layer"
    options = dict(base.loss_options)
    if variant.loss != "predsim" and model in NARROWED:
        options["similarity_channels"] = NARROWED[model]
    return replace(base, loss=variant.loss, loss_options=Options(options), at=at, seed=seed)


def learner_of(
    run: Run, at: str | int | Sequence[str], loss: str = "pred", width: float = 1 / 16
) -> Any:
    """A learner of the run's network on the CPU, with 32-pixel images."""
    network = layerwise.create_model(run.model, run.hierarchy, width=width, image_size=SIZE)
    return layerwise.localize(
        network,
        torch.zeros(2, 3, SIZE, SIZE),
        CLASSES,
        loss=loss,
        at=at,
        output_layer=run.output_layer,
        **head_options(run),
    )


def head_options(run: Run) -> dict[str, Any]:
    """The options of heads at full width, where channels are as the loss has them."""
    given = run.loss_options
    return {"decoder_dim": given["decoder_dim"]} if "decoder_dim" in given else {}


def lines(
    model: str, variants: Iterable[Variant], arguments: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """A line per variant: what it costs, and its accuracy beside predsim's with the same seeds."""
    whole = counted(learner_of(RUNS[model], 1, width=1.0), 1)
    reference = accuracies(partial(run_of, model, VARIANTS[0]), arguments.runs, arguments.seeds)
    for variant in variants:
        runs = partial(run_of, model, variant)
        found = accuracies(runs, arguments.runs, arguments.seeds)
        folders = finished(runs, arguments.runs, arguments.seeds).values()
        commits = {folder.facts()["commit"] or "unknown" for folder in folders}
        pairs = [found[seed] - reference[seed] for seed in found if seed in reference]
        run = run_of(model, variant, 0)
        at = parse_cut(run.at)
        learner = learner_of(run, at, variant.loss, width=1.0)
        heads = {id(p): p.numel() for unit in learner.units[:-1] for p in unit.loss.parameters()}
        yield {
            "model": model,
            "head": variant.text,
            "units": len(learner.units),
            "multiply-adds over global": f"{counted(learner, 2) / whole:.2f}",
            "head parameters, millions": f"{sum(heads.values()) / 1e6:.2f}",
            "peak MB": round(predicted_peak(run, at, variant.loss) / 1e6),
            "seeds": len(found),
            "test accuracy, %": mean_of(list(found.values())),
            "deviation": deviation_of(list(found.values())),
            "less predsim, points": mean_of(pairs),
            "its deviation": deviation_of(pairs),
            "runs of": ", ".join(sorted(commits)),
        }


def counted(learner: Any, steps: int) -> float:
    """Multiply-adds of a training step on average, for one image."""
    images, labels = torch.randn(COUNTED, 3, SIZE, SIZE), torch.arange(COUNTED)
    learner.train()
    with MultiplyAdds() as counter:
        for _ in range(steps):
            learner.step(images, labels)
    return counter.total / steps / COUNTED


def predicted_peak(run: Run, at: str | int | Sequence[str], loss: str) -> int:
    network = layerwise.create_model(run.model, run.hierarchy, image_size=SIZE)
    return layerwise.predict_peak(
        network,
        (BATCH, 3, SIZE, SIZE),
        CLASSES,
        loss=loss,
        at=at,
        output_layer=run.output_layer,
        **head_options(run),
    )


def mean_of(values: list[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def deviation_of(values: list[float]) -> str:
    return f"{stdev(values):.2f}" if len(values) > 1 else ""


if __name__ == "__main__":
    main()
