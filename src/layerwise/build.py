"""From a run's description to what trains: device, network, learner, schedule."""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerwise.allocator import free_memory, keep_freed_memory
from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput, choose
from layerwise.features import Keeping
from layerwise.hierarchy import parse_downsampling
from layerwise.learner import Learner, localize
from layerwise.losses import LOSSES, accepted_options
from layerwise.models import create_model
from layerwise.rules import RULES, Schedule
from layerwise.runs import FEATURES, Execution, Run, RunFolder
from layerwise.sizes import format_size, parse_size

SPARED = 0.8  # of the memory that is free, which --cache may take; the rest is for data and steps

# fused: one call per unit instead of several per tensor
OPTIMIZERS: dict[str, Callable[[Run], Callable[..., torch.optim.Optimizer]]] = {
    "adam": lambda run: partial(torch.optim.Adam, lr=run.lr, weight_decay=run.weight_decay, fused=True),
    "adamw": lambda run: partial(torch.optim.AdamW, lr=run.lr, weight_decay=run.weight_decay, fused=True),
    "sgd": lambda run: partial(torch.optim.SGD, lr=run.lr, weight_decay=run.weight_decay, momentum=run.momentum, fused=True),
}


def prepare_device(execution: Execution) -> torch.device:
    """The device to train on, made to give the same bits every time.

    Raises:
        InvalidInput: there is no such device.
    """
    for option, least in (("eval_every", 1), ("save_every", 1), ("workers", 0), ("separability_every", 0), ("streams", 1)):
        if getattr(execution, option) < least:
            raise InvalidInput(f"{option} {getattr(execution, option)} is too small: give {least} or more")
    name = execution.device
    if name == "auto":
        name = "cpu" if computes_on_cpu(execution) else "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"unknown device {name!r}: give cpu, cuda, cuda:0 … or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device {name!r} is not supported: give cpu, cuda, cuda:0 … or auto")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InvalidInput(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs; give --device cpu")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives the same bits only with this
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if device.type == "cpu" and execution.keep_memory:
        keep_freed_memory()
    if execution.cpu_threads is not None:
        most = os.cpu_count() or 1
        if not 1 <= execution.cpu_threads <= most:
            raise InvalidInput(
                f"cpu_threads {execution.cpu_threads} is out of range: this machine has {most}; give 1 to {most}"
            )
        torch.set_num_threads(execution.cpu_threads)
    return device


def build_learner(run: Run, images: ImageFormat, device: torch.device) -> Learner:
    """The run's network, cut and given losses and optimizers.

    Raises:
        InvalidInput: an option is out of range, or belongs to another loss.
        CannotSplit: the network cannot be cut where the run says.
    """
    check_run(run)
    rule = RULES[run.rule]
    torch.manual_seed(run.seed)
    model = create_model(
        run.model,
        run.hierarchy,
        run.width,
        images.num_classes,
        images.channels,
        images.image_size,
        run.dropout,
        run.downsample_after,
    ).to(device)
    return localize(
        model,
        torch.zeros(2, images.channels, images.image_size, images.image_size),
        num_classes=images.num_classes,
        loss=run.loss,
        at=rule.at or parse_cut(run.at),
        optimizer=OPTIMIZERS[run.optimizer](run),
        clip_grad=run.clip_grad,
        amp=amp_type(run),
        seed=run.seed,
        **options_for("loss", run.loss, run),
    )


def check_run(run: Run) -> None:
    """Refuse what can be refused without data: unknown names, numbers out of range, options of another rule or loss.

    Raises:
        InvalidInput: naming the option.
    """
    for item in fields(Run):
        value = getattr(run, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(f"{item.name} {value} is not a finite number: give one")
    for kind, name, known in (
        ("rule", run.rule, RULES),
        ("loss", run.loss, LOSSES),
        ("optimizer", run.optimizer, OPTIMIZERS),
    ):
        choose(kind, name, known)
    options_for("rule", run.rule, run)
    options_for("loss", run.loss, run)
    if run.downsample_after is not None:
        parse_downsampling(run.downsample_after)
    for name, valid, accepted in (
        ("epochs", run.epochs >= 1, "1 or more"),
        ("lr", 0 < run.lr < float("inf"), "a number above 0"),
        ("weight_decay", run.weight_decay >= 0, "0 or more"),
        ("momentum", 0 <= run.momentum < 1, "0 up to but not including 1"),
        ("decay_rate", 0 < run.decay_rate <= 1, "above 0, up to 1"),
        ("clip_grad", run.clip_grad is None or run.clip_grad > 0, "a number above 0"),
        ("segments", run.segments is None or run.segments >= 1, "1 or more"),
        ("threads", run.threads >= 1, "1 or more"),
        ("seed", 0 <= run.seed < 2**63, "0 or more, below 2 to the 63rd"),
    ):
        if not valid:
            raise InvalidInput(f"{name} {getattr(run, name)} is out of range: give {accepted}")
    decay(run)


def computes_on_cpu(execution: Execution) -> bool:
    return execution.device == "cpu" or (execution.device == "auto" and not torch.cuda.is_available())


def build_keeping(run: Run, execution: Execution, folder: RunFolder) -> Keeping:
    """Where the run keeps features, and how much of them.

    Raises:
        InvalidInput: an option is unknown, belongs to ``--cache`` and that is not given, or names no folder to write into.
    """
    for option in ("cache_dir", "cache_limit"):
        if not run.cache and getattr(execution, option) != getattr(Execution, option):
            raise InvalidInput(
                f"--{option.replace('_', '-')} says where or how much --cache keeps: give --cache, or leave it out"
            )
    limit = parse_size("--cache-limit", execution.cache_limit)
    bound = f"the limit of {format_size(limit)}"
    if execution.cache_dir is None:
        spared = int(SPARED * free) if computes_on_cpu(execution) and (free := free_memory()) is not None else limit
        if spared < limit:  # more would be promised, and the process killed when it is used
            return Keeping(None, spared, f"the {format_size(spared)} of free memory that can be spared")
        return Keeping(None, limit, bound)
    if not os.path.isdir(execution.cache_dir) or not os.access(execution.cache_dir, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"--cache-dir {execution.cache_dir!r} is not a folder that can be written to: make it, or give another"
        )
    digest = hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:12]  # several runs may share the folder
    return Keeping(Path(execution.cache_dir) / f"{digest}-{FEATURES}", limit, bound)


def decay(run: Run) -> Schedule:
    """The paper's schedule: the rate is multiplied by ``decay_rate`` when each milestone's share of training is done.

    Raises:
        InvalidInput: a milestone is not a number from 0 to 1.
    """
    try:
        milestones = [float(share) for share in run.decay_milestones.split(",") if share.strip()]
    except ValueError:
        milestones = [-1.0]
    if not all(0 <= share <= 1 for share in milestones):
        raise InvalidInput(
            f"decay_milestones {run.decay_milestones!r} are not shares of training: give numbers from 0 to 1 such as 0.5,0.75"
        )
    return lambda done: run.decay_rate ** sum(done >= share for share in milestones)


def parse_cut(at: str) -> str | int | list[str]:
    """``layer``, ``block``, a number of units, or module paths joined by commas."""
    if at in ("layer", "block"):
        return at
    return int(at) if at.isascii() and at.isdigit() else [path.strip() for path in at.split(",")]


def amp_type(run: Run) -> torch.dtype | None:
    return torch.bfloat16 if run.amp else None


def options_for(kind: str, chosen: str, run: Run) -> dict[str, Any]:
    """The run's values of the options that the chosen rule or loss has.

    Raises:
        InvalidInput: an option was changed that belongs to other rules or losses only.
    """
    table = {name: rule.order for name, rule in RULES.items()} if kind == "rule" else LOSSES
    accepted = accepted_options(table[chosen])
    defaults = {item.name: item.default for item in fields(Run)}
    for name, factory in table.items():
        for option in accepted_options(factory):
            if option in defaults and option not in accepted and getattr(run, option) != defaults[option]:
                raise InvalidInput(
                    f"--{option.replace('_', '-')} belongs to the {kind} {name!r}, not to {chosen!r}: leave it out"
                )
    given = {option: getattr(run, option) for option in accepted if option in defaults}
    return {option: value for option, value in given.items() if value is not None}  # None: the rule's or loss's own default
