"""From a run's description to what trains: every name an object, every refusal before any work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from layerwise.core.cuts import BUDGET
from layerwise.core.factories import OptimizerFactory, scale_rate
from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.memory_format import MEMORY_FORMATS
from layerwise.core.split import OUTPUT_LAYERS
from layerwise.data import DATASETS, Augmentation, DataSet, ImageFormat, Splits, make_splits
from layerwise.data.splits import choose_augmentation
from layerwise.errors import InvalidInput, brief, choose
from layerwise.losses import LOSSES, LossFactory
from layerwise.losses.terms import declaring_terms
from layerwise.measures import MEASURES
from layerwise.models import MODELS
from layerwise.rules import RULES, Rule, Schedule
from layerwise.runs.folder import RunFolder
from layerwise.runs.headings import parse_measures
from layerwise.runs.ranges import check_ranges
from layerwise.runs.run import Execution, Run
from layerwise.training.declared_options import choices, registries
from layerwise.training.device import find_device
from layerwise.training.networks import build_network, check_size, load_network, unsaid
from layerwise.training.optimizers import OPTIMIZERS
from layerwise.training.recorded_steps import memory_limit
from layerwise.training.schedule import decay
from layerwise.training.tensorboard import check_log
from layerwise.utils.options import checked_options, is_whole_number, options_of
from layerwise.utils.sizes import parse_size
from layerwise.utils.words import counted


@dataclass(frozen=True)
class Prepared:
    """A run of which every name has become an object, and nothing is left to refuse without data.

    Attributes:
        run: with its options as their owners declare them.
        losses: by the unit that each is for, from there on.
        cut: where units end, as ``localize`` takes it.
        amp: number type of forward passes, or None for the weights' own.
        schedule: share of the training done, 0 to 1 -> factor of the learning rate.
        augmentation: of the training images.
        device: where it trains.
        preset: record of the published settings that it began from, if it did.
        plan: record of the budget of memory that its units were planned by, if they were.
    """

    run: Run
    execution: Execution
    dataset: DataSet
    rule: Rule
    losses: dict[int, LossFactory]
    cut: str | int | list[str]
    optimizer: OptimizerFactory
    schedule: Schedule
    amp: torch.dtype | None
    augmentation: Augmentation
    device: torch.device
    measures: tuple[str, ...]
    preset: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None

    @property
    def own_cut(self) -> str | int | list[str]:
        """Where the run's units would end if its rule did not train the network as one."""
        return parse_cut(self.run.at)

    def loss_options(self) -> dict[str, Any]:
        """The run's options of those losses that units have: of one unit, the first's."""
        declared = {
            name for loss in self.losses.values() for name in options_of(declaring_terms(loss))
        }
        return {name: value for name, value in self.run.loss_options.items() if name in declared}

    def check_network(self) -> None:
        """Refuse a network that is not listed, or first weights, that do not fit the run's images.

        It is made for that, before data are read; where only the data tell the classes it is not.

        Raises:
            InvalidInput: as said.
        """
        listed = self.run.model in MODELS and self.run.weights is None
        if self.dataset.format.class_names and not listed:
            images = self.dataset.expected(self.run.image_size)
            with torch.random.fork_rng(devices=[]):
                build_network(self.run, images, weights=True)

    def load_data(self, say: Callable[[str], None] = unsaid) -> Splits:
        """The run's images, read, split and on the device.

        Args:
            say: is given lines about what is found.

        Raises:
            InvalidInput: files are missing, altered, or hold too few images.
        """
        return make_splits(
            self.dataset, self.augmentation, self.run, self.execution, self.device, say
        )

    def make_learner(
        self,
        images: ImageFormat,
        check: bool = False,
        weights: bool = False,
        say: Callable[[str], None] = unsaid,
    ) -> Learner:
        """The run's network for such images, cut and given losses and optimizers.

        Args:
            check: compare the units with the network; see ``localize``.
            weights: begin with those that the run names; see ``build_network``.
            say: is given lines about classifier and weights.

        Raises:
            InvalidInput: the network cannot be made for such images.
            CannotSplit: the network cannot be cut where the run says.
        """
        torch.manual_seed(self.run.seed)
        network = build_network(self.run, images, weights, say).to(self.device)
        refuse_untrainable(self.run.model, network)
        learner = localize(
            network,
            torch.zeros(2, images.channels, images.image_size, images.image_size),
            num_classes=images.num_classes,
            loss=self.losses,
            at=self.cut,
            output_layer=self.run.output_layer,
            optimizer=self.optimizer,
            memory_format=None,
            clip_grad=self.run.clip_grad,
            amp=self.amp,
            seed=self.run.seed,
            check=check,
            span=self.run.rule_options.get("span", 1),
            normalization=images.normalization,
            head_lr_factor=1.0 if self.run.is_global else self.run.head_lr_factor,
            train_from=self.run.train_from,
            teacher=self.load_teacher(images),
            **self.loss_options(),
        )
        *others, last = learner.units
        if others and last.optimizer is not None:
            scale_rate(last.optimizer, last.weights(), self.run.last_lr_factor)
        return learner

    def load_teacher(self, images: ImageFormat) -> nn.Module | None:
        """The network of the run that is the teacher, if one is named.

        Raises:
            InvalidInput: the run is not finished, its files are damaged, or its images had another
                number of channels.
        """
        if self.run.teacher is None:
            return None
        try:
            network, data = load_network(RunFolder(self.run.teacher), best=False)
        except InvalidInput as refusal:
            raise InvalidInput(
                f"Cannot use the teacher {brief(self.run.teacher)}: its run cannot be read from "
                f"here. {refusal}"
            ) from None
        if data["channels"] != images.channels:
            raise InvalidInput(
                f"Cannot use the teacher {brief(self.run.teacher)}: it reads images of "
                f"{counted(data['channels'], 'channel')}, and these have {images.channels}. Give "
                "one that was trained on images like these."
            )
        return network


def refuse_untrainable(name: str, network: nn.Module) -> None:
    """Refuse a network of which nothing learns, or that begins with numbers that are not finite.

    Raises:
        InvalidInput: as said.
    """
    learning = [item for item in network.named_parameters() if item[1].requires_grad]
    if not learning:
        raise InvalidInput(
            f"Cannot train {name}: none of its weights learns, since requires_grad is False for "
            "all of them. Let its function set it for those that should."
        )
    for path, weight in learning:
        if not weight.isfinite().all():
            raise InvalidInput(
                f"Cannot train {name}: its weight {path} holds numbers that are not finite. Let "
                "its function initialise it."
            )


def prepare(run: Run, execution: Execution) -> Prepared:
    """Resolve a run, and refuse whatever can be refused without its data.

    Raises:
        InvalidInput: a name is unknown, a number out of range, an option belongs to another loss,
            rule or network, or the network cannot be made.
    """
    check_ranges(run, execution)
    run = with_own_options(run)
    losses = {0: run.loss} if run.is_global else run.losses
    rule, dataset = RULES[run.rule], DATASETS[choose("data set", run.data, DATASETS)]
    size = run.image_size or dataset.format.image_size
    choose("output layer", run.output_layer, OUTPUT_LAYERS)
    choose("optimizer", run.optimizer, OPTIMIZERS)
    choose("memory format", execution.memory_format, MEMORY_FORMATS)
    parse_size("--cache-limit", execution.cache_limit)
    memory_limit(run, execution)
    check_log(execution.log)
    if dataset.format.class_names and run.model in MODELS:
        with torch.device("meta"):  # a network that cannot be made is refused before data are read
            network = build_network(run, replace(dataset.format, image_size=size))
        check_module_paths(run, network)
        check_size(run, network)
    return Prepared(
        run,
        execution,
        dataset,
        rule,
        {unit: LOSSES[name] for unit, name in losses.items()},
        rule.at or parse_cut(run.at),
        OPTIMIZERS[run.optimizer](run),
        decay(run),
        torch.bfloat16 if run.amp else None,
        choose_augmentation(run, dataset.padding_at(size), dataset.flip, size),
        find_device(execution),
        choose_measures(execution),
    )


def with_own_options(run: Run) -> Run:
    """The run with the options of its network, loss and rule, each checked by its owner.

    Raises:
        InvalidInput: an option belongs to another, or is of another type.
    """
    checked: dict[str, Any] = {
        f"{kind}_options": checked_options(
            kind, choices(run)[kind], registry, getattr(run, f"{kind}_options")
        )
        for kind, registry in registries(run).items()
    }
    return replace(run, **checked)


def parse_cut(at: str) -> str | int | list[str]:
    """``layer``, ``block``, ``module``, a number of units, or module paths joined by commas.

    Raises:
        InvalidInput: it is a budget of memory, from which no units were planned.
    """
    if at in ("layer", "block", "module"):
        return at
    if at.startswith(BUDGET):
        raise InvalidInput(
            f"Cannot use --at {brief(at)} here: units are planned for a training. Give it to "
            "layerwise train, audit or compare --losses, or give a number of units."
        )
    return int(at) if is_whole_number(at) else [path.strip() for path in at.split(",")]


def check_module_paths(run: Run, network: nn.Module) -> None:
    """Refuse paths of ``at`` that name no module of the network.

    Raises:
        InvalidInput: naming the first of them.
    """
    cut = parse_cut(run.at)
    modules = [name for name, _ in network.named_modules() if name]
    for path in cut if isinstance(cut, list) else ():
        if path not in modules:
            near = get_close_matches(path, modules, n=1) or modules[:1]
            raise InvalidInput(
                f"Cannot end a unit at {brief(repr(path))}: {run.model} has no such module. Give "
                f"layer, block, a number of units, or paths of modules such as {near[0]}."
            )


def choose_measures(execution: Execution) -> tuple[str, ...]:
    """Names of the measures that are taken while training, each once.

    Raises:
        InvalidInput: one of them is unknown.
    """
    names = parse_measures(execution.separability_measures)
    return tuple(choose("measure", name, MEASURES) for name in names)
