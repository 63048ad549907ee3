"""A run and its execution: what is trained, and where and how. No torch."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.hierarchy import format_hierarchy, parse_hierarchy
from layerwise.runs.fields import NO_OPTIONS, declared, option
from layerwise.runs.losses import parse_later_losses
from layerwise.utils.options import Options


@dataclass(frozen=True)
class Run:
    """One training, in full.

    The same run gives the same bits with the same machine, versions and memory formats. Every field
    is an option of ``layerwise train``, with hyphens for underscores. The options of a network, a
    loss and a rule are those that they declare; a run keeps the ones that are not at their default.
    """

    model: str = option("resnet18", "network to train; see `layerwise list models`")
    model_options: Options = declared("model")
    weights: str | None = option(
        None,
        "initial weights, from FILE: safetensors, or a state_dict saved by PyTorch (default: "
        "drawn by --seed)",
        metavar="FILE",
    )
    num_classes: int | None = option(
        None,
        "replace the classifier of the network or of --weights by one of N classes, if it has "
        "another number (default: the data set's, which --weights must fit)",
    )
    hierarchy: str | None = option(
        None, "convolutions or blocks per stage, such as 1,1,2,2 (default: as published)"
    )
    downsample_after: str | None = option(
        None,
        "convolutions or blocks after which maps are halved, such as 1,4,6 (default: at the ends "
        "of stages)",
    )
    width: float = option(1.0, "factor of the network's channel counts")
    dropout: float = option(
        0.0, "probability of dropping a channel after every unit", also=("--drop",)
    )
    data: str = option("digits", "data set; see `layerwise list datasets`", also=("--dataset",))
    image_size: int | None = option(
        None, "scale images to N pixels a side (default: the data set's)", also=("--img-size",)
    )
    train_images: int | None = option(
        None, "use only N training images, evenly over the classes (default: all)"
    )
    val_fraction: float = option(
        0.1, "share of the training images held out to choose the best epoch; 0: none"
    )
    rule: str = option("simultaneous", "order of updates; see `layerwise list rules`")
    rule_options: Options = declared("rule")
    loss: str = option("predsim", "local loss; see `layerwise list losses`")
    loss_options: Options = declared("loss")
    loss_from: str = option(
        "",
        "local loss of a unit and those behind it, such as 4=pred; may be repeated (default: all "
        "units have --loss)",
        repeated=True,
        metavar="UNIT=LOSS",
    )
    at: str = option(
        "layer",
        "where units end: layer, block, module, a number of units, module paths with commas, or "
        "memory:SIZE, the fewest whose training is predicted to fit",
    )
    output_layer: str = option(
        "joined",
        "the network's output layer: joined to the last unit, or separate, a unit of its own (the "
        "paper's way)",
    )
    train_from: str | None = option(
        None,
        "name or number of the first unit that learns; those before are frozen, and it becomes "
        "unit 0 (default: all learn)",
        metavar="UNIT",
    )
    teacher: str | None = option(
        None,
        "folder of a finished run, whose network the loss match compares units with (default: the "
        "network itself as it begins)",
        metavar="RUN",
    )
    epochs: int = option(400, "passes over the training images; by a sequential rule, of each unit")
    batch_size: int = option(128, "images in a batch", short="-b")
    optimizer: str = option("adam", "optimizer: adam, adamw, sgd or nesterov", also=("--opt",))
    lr: float = option(5e-4, "learning rate", also=("--learning-rate",))
    head_lr_factor: float = option(1.0, "learning rate of heads, relative to their units'")
    last_lr_factor: float = option(
        1.0, "learning rate of the last unit, relative to that of the others"
    )
    momentum: float = option(0.9, "momentum of sgd and nesterov")
    weight_decay: float = option(0.0, "weight decay")
    decay_rate: float = option(0.25, "factor of the learning rate at every milestone")
    decay_milestones: str = option(
        "0.5,0.75,0.89,0.94",
        "shares of training after which the rate decays; empty: never; cosine: it follows half a "
        "cosine to 0; cosine:0.1: it first rises over a tenth of training",
    )
    clip_grad: float | None = option(None, "largest norm of a unit's gradient (default: no limit)")
    augment: bool = option(True, "crop and flip training images as the data set allows")
    crop_padding: int | None = option(
        None, "padding of random crops, in pixels (default: the data set's)"
    )
    flip: bool | None = option(
        None, "mirror images at random (default: the data set's)", also=("--hflip",)
    )
    cutout: int = option(0, "side of a square blanked in every training image, in pixels; 0: none")
    views: int | None = option(
        None, "use N augmentations of every image in turn (default: a new one every epoch)"
    )
    seed: int = option(0, "seed of weights, held-out images, order, augmentation and dropout")
    amp: bool = option(False, "mixed precision: bfloat16 forward passes")

    @property
    def is_global(self) -> bool:
        """Whether the description alone says that the network is one unit, so no loss is local."""
        return self.rule in GLOBAL_RULES or self.at == "1"

    @property
    def losses(self) -> dict[int, str]:
        """Its local losses by the unit that each begins at; that of ``--loss`` at 0.

        Raises:
            InvalidInput: see ``parse_later_losses``.
        """
        return {0: self.loss, **(parse_later_losses(self.loss_from) if self.loss_from else {})}

    @property
    def loss_in_words(self) -> str:
        """Its local losses, such as ``dgl-cnn, from unit 4 pred``."""
        later = list(self.losses.items())[1:]
        return ", ".join([self.loss, *(f"from unit {unit} {loss}" for unit, loss in later)])


# options of an execution on several ranks
ON_RANKS = ("ranks", "run_ahead", "replicas", "sync_batch_norm", "gather_examples", "rank_timeout")
GLOBAL_RULES = ("global", "checkpointed")  # they cut the network into one unit
# fields that say something of local losses alone
LOCAL = ("loss", "loss_from", "head_lr_factor", "last_lr_factor", "train_from", "teacher")


def without_idle(run: Run) -> Run:
    """A run that trains the network as one unit, without what only local losses read."""
    if not run.is_global:
        return run
    return replace(
        run,
        **{name: getattr(Run, name) for name in LOCAL},
        loss_options=NO_OPTIONS,
        at=Run.at if run.rule in GLOBAL_RULES else run.at,
    )


@dataclass(frozen=True)
class Execution:
    """Where and how a run is carried out.

    It may change when the run is resumed, but the bits can then differ.
    """

    data_dir: str = option("data", "folder that holds the data set's files")
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto: a GPU if there is one")
    workers: int = option(
        2, "processes that read image files, where they are too many for memory", short="-j"
    )
    cpu_threads: int | None = option(
        None, "threads of each operation on a CPU (default: PyTorch's)"
    )
    keep_memory: bool = option(
        True,
        "on a CPU: keep freed memory for the next tensors, which is faster, but the process stays "
        "large",
    )
    memory_format: str = option(
        "auto",
        "memory format of maps: contiguous, channels-last, auto (a fixed rule) or trial (time each "
        "unit in both)",
        also=("--layout",),
    )
    graphs: bool = option(
        True, "on a GPU: record a training step once and replay it, which is faster"
    )
    streams: int | None = option(
        None,
        "on a GPU, with --graphs: streams on which steps of units overlap; 1 uses the least memory "
        "(default: up to 4, as many as keep to --memory)",
    )
    memory: str | None = option(
        None,
        "most memory of a step, such as 4GB: on a GPU, streams keep to it (default: a tenth more "
        "than on one stream); by the rule checkpointed, as little is recomputed as keeps to it",
    )
    cache_dir: str | None = option(
        None, "folder for the features that --cache keeps (default: in memory)"
    )
    cache_limit: str = option(
        "4GB", "most that --cache may keep; features beyond it are recomputed for every batch"
    )
    download: bool = option(False, "download the data set if it is missing")
    eval_every: int = option(1, "evaluate every N epochs")
    save_every: int = option(1, "save the state to resume from every N epochs")
    log: str | None = option(
        None,
        "also write every epoch's numbers into the run's folder for a viewer: tensorboard",
    )
    separability_every: int = option(
        0, "measure separability every N epochs and at the end; 0: never"
    )
    separability_measures: str = option(
        "linear_probe,nearest_class_mean",
        "measures of --separability-every, joined by commas; gains are of the first; see "
        "`layerwise list measures`",
    )
    separability_against: str | None = option(
        None, "folder of a run to compare features with by CKA, at --separability-every; '': none"
    )
    ranks: str | None = option(
        None,
        "on several ranks: numbers of units on each, such as 5,4; '': balanced by measured time "
        "(the default)",
    )
    run_ahead: int = option(
        2,
        "on several ranks: batches that a rank may be ahead of the next; each takes the memory of "
        "the features between them",
    )
    replicas: int = option(
        1,
        "on several ranks: replicas of the network, each of which learns from a share of every "
        "batch",
    )
    sync_batch_norm: bool = option(
        True,
        "with --replicas: batch normalisation takes its statistics of the whole batch, not of each "
        "share",
    )
    gather_examples: bool = option(
        True,
        "with --replicas: losses that compare examples, such as sim, compare those of the whole "
        "batch, not of each share",
    )
    rank_timeout: float = option(
        300.0,
        "on several ranks: seconds after which a rank that does not answer is given up, and all "
        "others end",
    )


def run_name(run: Run) -> str:
    """A folder name: the main things in words, the rest in a hash, so that runs never collide."""
    return f"{run_words(run)}-{run_digest(run)}"


def run_words(run: Run) -> str:
    """The part of a run's name that is in words."""
    hierarchy = format_hierarchy(parse_hierarchy(run.hierarchy)) if run.hierarchy else "default"
    halvings = f"-halved-{run.downsample_after}" if run.downsample_after else ""
    shape = (hierarchy.strip("[]") + halvings).replace(",", "-")
    loss = [] if run.is_global else run.losses.values()
    data = Path(run.data).name
    return "-".join([file_words(run.model), shape, data, run.rule, *loss, f"seed{run.seed}"])


def file_words(model: str) -> str:
    """A network's name as part of a file's: without folders where it names a file or a library."""
    if ":" not in model:
        return model
    return re.sub(r"[^\w.]+", "-", "-".join(Path(part).name for part in model.split(":")))


def run_digest(run: Run) -> str:
    return hashlib.sha256(json.dumps(described(run), sort_keys=True).encode()).hexdigest()[:6]


def described(run: Run) -> dict[str, Any]:
    """A run as files hold it: plain values, options as tables."""
    return {
        name: value
        for name, value in plain_values(run).items()
        if name not in ADDED or value != getattr(Run, name)
    }


def plain_values(run: Run) -> dict[str, Any]:
    """The value of every field, options as tables."""
    return {
        name: dict(value) if isinstance(value, Options) else value
        for name, value in asdict(run).items()
    }


# Fields that format 3 did not have at first. Files leave them out at their default, so that runs
# without them are read, named and found again as before.
ADDED = (
    "loss_from",
    "head_lr_factor",
    "last_lr_factor",
    "weights",
    "num_classes",
    "train_from",
    "teacher",
)
