"""From a run's description to what trains: every name an object, every refusal before any work."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core.cuda_graphs import CapturedSteps
from layerwise.core.factories import scale_rate
from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.memory_format import MEMORY_FORMATS
from layerwise.core.split import OUTPUT_LAYERS
from layerwise.data import DATASETS, Augmentation, DataSet, ImageFormat, Splits, make_splits
from layerwise.data.splits import choose_augmentation
from layerwise.errors import InvalidInput, brief, choose
from layerwise.hierarchy import Hierarchy, parse_hierarchy
from layerwise.losses import LOSSES, LossFactory
from layerwise.losses.terms import declaring_terms
from layerwise.measures import MEASURES
from layerwise.models import MODELS, create_model, hierarchical, published_hierarchy
from layerwise.rules import RULES, Keeping, Rule, Schedule
from layerwise.runs.losses import losses_of
from layerwise.runs.ranges import check_ranges
from layerwise.runs.run import Execution, Run
from layerwise.training.schedule import decay
from layerwise.training.tensorboard import check_log
from layerwise.utils.allocator import free_memory, keep_freed_memory
from layerwise.utils.device import device_of
from layerwise.utils.launch import launched_local_rank
from layerwise.utils.options import Options, checked_options, options_of
from layerwise.utils.sizes import format_size, parse_size

SPARED = 0.8  # of the memory that is free, which --cache may take; the rest is for data and steps
MOST_DIGITS = 10  # of a number of units
FEATURES = "features.cache"  # a file of features; it loses its name as soon as it is made

OptimizerFactory = Callable[..., torch.optim.Optimizer]

# fused: one call per unit instead of several per tensor
OPTIMIZERS: dict[str, Callable[[Run], OptimizerFactory]] = {
    "adam": lambda run: partial(
        torch.optim.Adam, lr=run.lr, weight_decay=run.weight_decay, fused=True
    ),
    "adamw": lambda run: partial(
        torch.optim.AdamW, lr=run.lr, weight_decay=run.weight_decay, fused=True
    ),
    "sgd": lambda run: partial(
        torch.optim.SGD,
        lr=run.lr,
        weight_decay=run.weight_decay,
        momentum=run.momentum,
        fused=True,
    ),
    "nesterov": lambda run: partial(
        torch.optim.SGD,
        lr=run.lr,
        weight_decay=run.weight_decay,
        momentum=run.momentum,
        nesterov=run.momentum > 0,  # which PyTorch refuses otherwise
        fused=True,
    ),
}


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

    def load_data(self, say: Callable[[str], None] = lambda line: None) -> Splits:
        """The run's images, read, split and on the device.

        Args:
            say: is given lines about what is found.

        Raises:
            InvalidInput: files are missing, altered, or hold too few images.
        """
        return make_splits(
            self.dataset, self.augmentation, self.run, self.execution, self.device, say
        )

    def make_learner(self, images: ImageFormat, check: bool = False) -> Learner:
        """The run's network for such images, cut and given losses and optimizers.

        Args:
            check: compare the units with the network; see ``localize``.

        Raises:
            InvalidInput: the network cannot be made for such images.
            CannotSplit: the network cannot be cut where the run says.
        """
        torch.manual_seed(self.run.seed)
        learner = localize(
            build_network(self.run, images).to(self.device),
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
            head_lr_factor=self.run.head_lr_factor,
            **self.loss_options(),
        )
        *others, last = learner.units
        if others and last.optimizer is not None:
            scale_rate(last.optimizer, last.weights(), self.run.last_lr_factor)
        return learner


def prepare(run: Run, execution: Execution) -> Prepared:
    """Resolve a run, and refuse whatever can be refused without its data.

    Raises:
        InvalidInput: a name is unknown, a number out of range, an option belongs to another loss,
            rule or network, or the network cannot be made.
    """
    check_ranges(run, execution)
    run = with_own_options(run)
    losses = {0: run.loss} if run.is_global else losses_of(run)
    rule, dataset = RULES[run.rule], DATASETS[choose("data set", run.data, DATASETS)]
    size = run.image_size or dataset.format.image_size
    choose("output layer", run.output_layer, OUTPUT_LAYERS)
    choose("optimizer", run.optimizer, OPTIMIZERS)
    choose("memory format", execution.memory_format, MEMORY_FORMATS)
    parse_size("--cache-limit", execution.cache_limit)
    check_log(execution.log)
    if dataset.format.class_names:
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
        parse_measures(execution),
    )


def registries() -> dict[str, Mapping[str, Callable[..., Any]]]:
    """Networks, rules and losses by name: the choices of a run that declare options."""
    orders = {name: rule.order for name, rule in RULES.items()}
    losses = {name: declaring_terms(factory) for name, factory in LOSSES.items()}
    return {"model": MODELS, "rule": orders, "loss": losses}


def choices(run: Run) -> dict[str, list[str]]:
    """The entries of ``registries`` that a run names, of each kind."""
    losses = list(dict.fromkeys(losses_of(run).values()))
    return {"model": [run.model], "rule": [run.rule], "loss": losses}


def with_own_options(run: Run) -> Run:
    """The run with the options of its network, loss and rule, each checked by its owner.

    Raises:
        InvalidInput: an option belongs to another, or is of another type.
    """
    checked: dict[str, Any] = {
        f"{kind}_options": checked_options(
            kind, choices(run)[kind], registry, getattr(run, f"{kind}_options")
        )
        for kind, registry in registries().items()
    }
    return replace(run, **checked)


def with_rule(run: Run, rule: str) -> Run:
    """The run by another rule, with those options of a rule that the new one declares.

    Raises:
        InvalidInput: the rule is unknown.
    """
    declared = options_of(RULES[choose("rule", rule, RULES)].order)
    shared = {name: value for name, value in run.rule_options.items() if name in declared}
    return replace(run, rule=rule, rule_options=Options(shared))


def hierarchy_of(run: Run) -> Hierarchy | None:
    """The run's hierarchy; None of a network that has none."""
    if run.hierarchy:
        return parse_hierarchy(run.hierarchy)
    return published_hierarchy(run.model) if run.model in hierarchical() else None


def build_network(run: Run, images: ImageFormat) -> nn.Module:
    """The run's network for images of a format.

    Raises:
        InvalidInput: it cannot be made so.
    """
    return create_model(
        run.model,
        run.hierarchy,
        run.width,
        images.num_classes,
        images.channels,
        images.image_size,
        run.dropout,
        run.downsample_after,
        **run.model_options,
    )


def parse_cut(at: str) -> str | int | list[str]:
    """``layer``, ``block``, ``module``, a number of units, or module paths joined by commas."""
    if at in ("layer", "block", "module"):
        return at
    number = at.isascii() and at.isdigit() and len(at) < MOST_DIGITS
    return int(at) if number else [path.strip() for path in at.split(",")]


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


def check_size(run: Run, network: nn.Module) -> None:
    """Refuse a network whose weights do not fit into the free memory that it is made in.

    Raises:
        InvalidInput: as said.
    """
    size = sum(weight.nelement() * weight.element_size() for weight in network.parameters())
    free = free_memory()
    if free is not None and size > free:
        raise InvalidInput(
            f"Cannot make {run.model}: its weights alone take {format_size(size)}, and "
            f"{format_size(free)} of memory is free. Lower --width or give a smaller hierarchy."
        )


def parse_measures(execution: Execution) -> tuple[str, ...]:
    """Names of the measures that are taken while training, each once."""
    names = [name.strip() for name in execution.separability_measures.split(",")]
    for name in names:
        choose("measure", name, MEASURES)
    return tuple(dict.fromkeys(names))


def find_device(execution: Execution) -> torch.device:
    """The device to train on.

    Raises:
        InvalidInput: there is no such device.
    """
    name = execution.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidInput(
            f"Cannot use device {brief(repr(name))}: it is neither a CPU nor a CUDA GPU. Give cpu, "
            "cuda, cuda:0 … or auto."
        )
    return numbered_gpu(device) if device.type == "cuda" else device


def numbered_gpu(device: torch.device) -> torch.device:
    """A GPU by its number; without one, each rank on a machine has the next.

    Raises:
        InvalidInput: there are fewer.
    """
    count = torch.cuda.device_count()
    index = launched_local_rank() if device.index is None else device.index
    if index >= count:
        raise InvalidInput(
            f"Cannot use device {f'cuda:{index}'!r}: torch sees {count} GPUs. Give --device cpu, "
            "or start at most one rank for each."
        )
    return torch.device("cuda", index)


def apply_execution(device: torch.device, execution: Execution) -> None:
    """Set this process up: the same bits every time, memory that is kept, threads."""
    if device.type == "cuda":
        # cuBLAS gives the same bits only with this
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.cuda.set_device(device)
    elif execution.keep_memory:
        keep_freed_memory()
    if execution.cpu_threads is not None:
        torch.set_num_threads(execution.cpu_threads)


def feature_keeping(prepared: Prepared, run_path: Path) -> Mapping[str, Keeping]:
    """Where and how much a rule that caches features keeps, as its argument; nothing for others.

    Args:
        run_path: of the run's folder, which names its file: several runs may share a cache folder.

    Raises:
        InvalidInput: an option of the cache is given without it, or names no folder to write into.
    """
    execution = prepared.execution
    if not prepared.run.rule_options.get("cache"):
        for name in ("cache_dir", "cache_limit"):
            if getattr(execution, name) != getattr(Execution, name):
                raise InvalidInput(
                    f"Cannot use --{name.replace('_', '-')} without --cache: there are no features "
                    "to keep. Give --cache, or leave it out."
                )
        return {}
    limit = parse_size("--cache-limit", execution.cache_limit)
    bound = f"the limit of {format_size(limit)}"
    if execution.cache_dir is not None:
        return {"keeping": Keeping(cache_file(execution.cache_dir, run_path), limit, bound)}
    free = free_memory() if prepared.device.type == "cpu" else None
    spared = limit if free is None else int(SPARED * free)
    if spared < limit:  # more would be promised, and the process killed when it is used
        bound = f"the {format_size(spared)} of free memory that can be spared"
    return {"keeping": Keeping(None, min(limit, spared), bound)}


def cache_file(folder: str, run_path: Path) -> Path:
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"Cannot use --cache-dir {folder!r}: it is not a folder that can be written to. Make "
            "it, or give another."
        )
    digest = hashlib.sha256(str(run_path.resolve()).encode()).hexdigest()[:12]
    return Path(folder) / f"{digest}-{FEATURES}"


def record_steps(learner: Learner, execution: Execution) -> None:
    """Let a learner's steps be recorded if it is on a GPU and the run asks for it."""
    if execution.graphs and not learner.windowed and device_of(learner.model).type == "cuda":
        learner.captured = CapturedSteps(learner, execution.streams)
