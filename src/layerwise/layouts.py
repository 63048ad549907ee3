"""In which order maps lie in memory: per unit whichever a short trial on this machine finds faster.

Neither order is always faster, and on a CPU in bfloat16 the wrong one can make a weight gradient a hundred times slower; so
nothing is assumed. What was found is kept, so that a machine tries a unit once and repeated runs choose alike.
"""

import contextlib
import copy
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from layerwise.errors import InvalidInput, choose
from layerwise.graph import modes_kept
from layerwise.learner import Learner
from layerwise.losses import Targets
from layerwise.machine import device_name
from layerwise.memory import device_of, synchronise
from layerwise.units import Carried, Unit

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
LAYOUTS = [*FORMATS, "auto"]
UNTRIED = FORMATS | {"auto": torch.channels_last}  # auto without a trial: as trials mostly end
TRIAL_BATCH = 16
REPETITIONS = 3  # interleaved, after one that is not counted
ADVANTAGE = 0.97  # share of the contiguous layout's time below which the other is taken
REGISTER = 8  # float32 numbers of an AVX2 register
CACHE = "LAYERWISE_CACHE"  # environment variable: a folder for what is kept between runs


def lay_out(learner: Learner, layout: str, known: Any = None) -> list[str]:
    """Give every unit the layout that is asked for, or the contiguous one where another is not safe; return them by name.

    Args:
        layout: a name in ``FORMATS``, or ``auto``.
        known: the names that were chosen before, for a run that goes on; anything else is passed over.

    Raises:
        InvalidInput: an unknown layout, or known ones of another number of units.
    """
    if layout != "auto":
        chosen = [choose("layout", layout, LAYOUTS)] * len(learner.units)
    elif isinstance(known, list) and [name for name in known if name in LAYOUTS[:-1]] == known != []:
        if len(known) != len(learner.units):
            raise InvalidInput(f"layouts of {len(known)} units are given for {len(learner.units)}: restore run.json")
        chosen = known
    else:
        chosen = fastest(learner)
    if device_of(learner).type == "cpu":
        chosen = ["contiguous" if endangered(unit) else name for unit, name in zip(learner.units, chosen, strict=True)]
    for unit, name in zip(learner.units, chosen, strict=True):
        unit.lay_out(FORMATS[name])
    return chosen


def endangered(unit: Unit) -> bool:
    """Whether a CPU's convolutions could write past their memory in channels-last.

    On processors with AVX2 alone, the weight gradient of a strided 1×1 convolution of fewer channels than a register holds is
    wrong there, and what lies behind it is overwritten (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convolutions = (module for part in (unit.piece, unit.loss) for module in part.modules() if isinstance(module, nn.Conv2d))
    return any(
        one.kernel_size == (1, 1) and max(one.stride) > 1 and one.in_channels // one.groups < REGISTER for one in convolutions
    )


def fastest(learner: Learner) -> list[str]:
    """The faster layout for each unit, from the trials kept or from new ones."""
    device = device_of(learner)
    if device.type == "cuda":  # whose tensor cores compute in this order; a trial of a unit would time launches
        return ["channels-last"] * len(learner.units)
    machine = [torch.__version__, device_name(device), torch.get_num_threads()]
    path = cache_folder() / "layouts.json"
    kept = read(path)
    carried: Carried = (torch.zeros(2, *learner.image_shape, device=device, dtype=learner.image_type),)
    chosen, tried = [], False
    for unit in learner.units:
        key = fingerprint(unit, carried, machine)
        if device.type == "cpu" and endangered(unit):
            kept[key] = "contiguous"
        elif kept.get(key) not in FORMATS:
            kept[key], tried = trial(unit, carried, learner.num_classes), True
        chosen.append(kept[key])
        carried = passed(unit, carried)
    if tried:
        write(path, read(path) | kept)  # another process may have added to it
    return chosen


@torch.no_grad()
def passed(unit: Unit, carried: Carried) -> Carried:
    """What a unit hands on, leaving running statistics and modes as they were."""
    with modes_kept(unit.piece):
        unit.piece.eval()
        return unit.forward(carried)


def trial(unit: Unit, carried: Carried, num_classes: int) -> str:
    """Time a copy of a unit on random maps in each layout."""
    maps = [value for value in carried if isinstance(value, Tensor) and value.dim() == 4]
    if len(maps) < sum(isinstance(value, Tensor) for value in carried):  # vectors have one layout only
        return "contiguous"
    device = maps[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return race(unit, carried, num_classes, device)


def race(unit: Unit, carried: Carried, num_classes: int, device: torch.device) -> str:
    """Let copies of a unit in each layout make passes in turn, and name the faster; draws random numbers."""
    batch = tuple(random_like(value) if isinstance(value, Tensor) else value for value in carried)
    targets = Targets(torch.arange(TRIAL_BATCH, device=device) % num_classes, num_classes)
    copies = {}
    for name, memory_format in FORMATS.items():
        copies[name] = Unit(unit.index, unit.name, *copy.deepcopy((unit.piece, unit.loss)), None, amp=unit.amp)
        copies[name].train()
        copies[name].lay_out(memory_format)
    times = {name: float("inf") for name in FORMATS}
    for repetition in range(REPETITIONS + 1):
        for name, one in copies.items():
            seconds = timed(one, one_layout(batch, FORMATS[name]), targets)
            times[name] = min(times[name], seconds) if repetition else times[name]
    return "channels-last" if times["channels-last"] < ADVANTAGE * times["contiguous"] else "contiguous"


def random_like(value: Tensor) -> Tensor:
    return torch.rand(TRIAL_BATCH, *value.shape[1:], device=value.device).to(value.dtype)


def one_layout(batch: Carried, memory_format: torch.memory_format) -> Carried:
    return tuple(value.contiguous(memory_format=memory_format) if isinstance(value, Tensor) else value for value in batch)


def timed(unit: Unit, batch: Carried, targets: Targets) -> float:
    """Seconds of a forward and a backward pass."""
    synchronise(targets.labels.device)
    begin = time.perf_counter()
    _, evaluated = unit.evaluate(batch, targets)
    if unit.parameters():
        evaluated.loss.backward()
    synchronise(targets.labels.device)
    return time.perf_counter() - begin


def fingerprint(unit: Unit, carried: Carried, machine: Sequence[object]) -> str:
    """What the time of a unit's step depends on, as a short text; the same for units that are built alike."""
    assert isinstance(unit.piece, fx.GraphModule)
    nodes = [describe(unit.piece, node) for node in unit.piece.graph.nodes]
    shapes = [(*value.shape[1:], str(value.dtype)) if isinstance(value, Tensor) else value for value in carried]
    kernels = [getattr(module, "kernel", None) for module in unit.loss.modules()]  # which its representation leaves out
    facts = repr((nodes, repr(unit.loss), kernels, shapes, str(unit.amp), TRIAL_BATCH, machine))
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def describe(piece: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return repr(piece.get_submodule(str(node.target)))
    return f"{node.op} {getattr(node.target, '__name__', node.target)}" if node.op.startswith("call") else node.op


def cache_folder() -> Path:
    """Where things are kept between runs: ``LAYERWISE_CACHE``, or the user's cache folder."""
    given, caches = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path(caches or os.path.expanduser("~/.cache")) / "layerwise"


def read(path: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
        if isinstance(kept, dict):
            return kept
    return {}


def write(path: Path, kept: dict[str, str]) -> None:
    """Keep what was found; where nothing can be written, it is found again next time."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(kept))
        draft.replace(path)


def summary(chosen: Sequence[str]) -> str:
    """The layouts in words, for the line that says what was chosen."""
    count = sum(name == "channels-last" for name in chosen)
    if count in (0, len(chosen)):
        return "channels-last" if count else "contiguous"
    return f"channels-last in {count} of {len(chosen)} units"
