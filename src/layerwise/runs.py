"""What a run is, and the folder it is kept in. No torch: reports and the command line read runs without it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout

from layerwise.errors import Busy, InvalidInput
from layerwise.hierarchy import format_hierarchy, parse_hierarchy


def option(default: Any, text: str, **extra: Any) -> Any:
    """A field of ``Run`` that is an option of the command line; ``short`` and ``also`` give it more names.

    One that came ``later`` is left out of names and files where it has its default, so that those of before stay the same.
    """
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class Run:
    """One training, in full: with the same machine, versions and memory formats, the same run gives the same bits.

    Every field is an option of ``layerwise train``, with hyphens for underscores.
    """

    model: str = option("resnet18", "network to train; see `layerwise list models`")
    hierarchy: str | None = option(None, "layers per stage, such as 1,1,2,2 (default: as published)")
    width: float = option(1.0, "multiplier of the network's channel counts")
    data: str = option("digits", "data set; see `layerwise list datasets`", also=("--dataset",))
    image_size: int | None = option(None, "scale images to this many pixels (default: the data set's)", also=("--img-size",))
    train_images: int | None = option(None, "use only this many training images, evenly over the classes")
    val_fraction: float = option(0.1, "share of all training images held out to choose the best epoch; 0: none")
    rule: str = option("simultaneous", "order of updates; see `layerwise list rules`")
    loss: str = option("predsim", "local loss; see `layerwise list losses`")
    at: str = option("layer", "where units end: layer, block, a number of units, or module paths joined by commas")
    beta: float = option(0.99, "weight of the similarity loss in predsim")
    decoder_dim: int = option(4096, "largest input of a unit's classifier in pred and predsim")
    head_size: int | None = option(None, "predsim-lite: pixels a side that features are averaged to (default: 8)")
    similarity_size: int | None = option(
        None, "pixels a side that the similarity loss averages features to (default: 4 in predsim-lite, else as they are)"
    )
    similarity_channels: int | None = option(
        None, "most channels of the similarity loss's 3×3 convolution (default: 256 in predsim-lite, else all)"
    )
    cache: bool = option(
        False,
        "sequential: keep what enters a unit instead of computing it for every batch; needs --views N, of which all are kept, "
        "at N times the size, or --no-augment",
    )
    segments: int | None = option(
        None, "checkpointed: stretches the network is cut into (default: those that need the least memory)"
    )
    threads: int = option(2, "parallel: groups of units, a thread each")
    epochs: int = option(400, "passes over the training images (sequential: for each unit)")
    batch_size: int = option(128, "images in a batch", short="-b")
    optimizer: str = option("adam", "adam, adamw or sgd", also=("--opt",))
    lr: float = option(5e-4, "learning rate", also=("--learning-rate",))
    momentum: float = option(0.9, "momentum of sgd")
    weight_decay: float = option(0.0, "weight decay")
    decay_rate: float = option(0.25, "factor of the learning rate at every milestone")
    decay_milestones: str = option("0.5,0.75,0.89,0.94", "shares of training after which the rate decays; empty: never")
    clip_grad: float | None = option(None, "largest norm of a unit's gradient")
    dropout: float = option(0.0, "probability of dropping a channel after every unit", also=("--drop",))
    augment: bool = option(True, "crop and flip training images as the data set allows")
    crop_padding: int | None = option(None, "pixels of padding for random crops (default: the data set's)")
    flip: bool | None = option(None, "mirror images at random (default: the data set's)", also=("--hflip",))
    cutout: int = option(0, "side in pixels of a square blanked in every training image")
    views: int | None = option(None, "limit the augmentations of an image to this many, repeated in turn")
    seed: int = option(0, "of weights, split, order, augmentation and dropout")
    amp: bool = option(False, "mixed precision: bfloat16 forward passes")
    downsample_after: str | None = option(
        None,
        "after how many convolutions or blocks maps are halved, such as 1,4,6 (default: where stages end, as published)",
        later=True,
    )


@dataclass(frozen=True)
class Execution:
    """Where and how a run is carried out; it may change when the run is resumed, but the bits can then differ."""

    data_dir: str = option("data", "folder that holds the data set's files")
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto: a GPU if there is one")
    workers: int = option(2, "processes that read images from folders too large for memory", short="-j")
    cpu_threads: int | None = option(None, "threads of each operation on a CPU (default: torch's)")
    keep_memory: bool = option(True, "on a CPU: keep freed memory for the next tensors; faster, but the process stays large")
    memory_format: str = option(
        "auto",
        "of maps: contiguous, channels-last, auto (by a fixed rule), or trial (by timing each unit in both)",
        also=("--layout",),
    )
    graphs: bool = option(True, "on a GPU: record a training step once and replay it, for it is faster")
    streams: int = option(4, "on a GPU, with --graphs: streams that units take turns on and so overlap; 1 needs least memory")
    cache_dir: str | None = option(None, "keep what --cache keeps in a file in this folder (default: in memory)")
    cache_limit: str = option("4GB", "most that --cache may keep; what exceeds it is computed for every batch")
    download: bool = option(False, "fetch the data set if it is not there")
    eval_every: int = option(1, "evaluate after every so many epochs")
    save_every: int = option(1, "save the state to resume from after every so many epochs")
    log: str | None = option(None, "also write every epoch's numbers for a viewer, into the run's folder: tensorboard")
    separability_every: int = option(0, "measure separability after every so many epochs and at the end; 0: never")
    separability_measures: str = option(
        "linear_probe,nearest_class_mean",
        "measures of --separability-every; gains are of the first; see `layerwise list measures`",
    )
    separability_against: str | None = option(None, "run to compare features with at --separability-every, by CKA; '': none")


CONFIGURATION, LOG, RESULT, STATE = "run.json", "log.jsonl", "result.json", "last.pt"
WEIGHTS, BEST = "model.safetensors", "best.safetensors"  # of the last epoch, and of the best on the validation images
SEPARABILITY = "separability.jsonl"
LOCK, DRAFT = "lock", ".draft"
FEATURES = "features.cache"  # loses its name as soon as it is made: seen only after a kill at that moment
RETIRED = {"cache_type": "float32"}  # options that runs once had, and the value of each that is still how a run is carried out
FORMAT = 2  # of the folder


def run_name(run: Run) -> str:
    """A folder name that says the main things in words and the rest in a hash, so that different runs never collide."""
    hierarchy = format_hierarchy(parse_hierarchy(run.hierarchy)) if run.hierarchy else "default"
    halvings = f"-halved-{run.downsample_after}" if run.downsample_after else ""
    shape = (hierarchy.strip("[]") + halvings).replace(",", "-")
    digest = hashlib.sha256(json.dumps(described(run), sort_keys=True).encode()).hexdigest()[:6]
    data = Path(run.data).name
    local = [] if run.rule in ("global", "checkpointed") else [run.loss]
    return "-".join([run.model, shape, data, run.rule, *local, f"seed{run.seed}", digest])


def described(run: Run) -> dict[str, Any]:
    """A run as files and names hold it; with the retired options, so that those of before stay the same."""
    later = [item.name for item in fields(Run) if item.metadata.get("later")]
    present = {name: value for name, value in asdict(run).items() if name not in later or value != getattr(Run, name)}
    return present | RETIRED


def without_retired(source: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options from a file, less those that runs once had.

    Raises:
        InvalidInput: one of those has a value that no run can be carried out with any more.
    """
    for name, value in RETIRED.items():
        if values.get(name, value) != value:
            raise InvalidInput(
                f"Cannot use the run in {source}: its {name} is {values[name]!r}, and only {value!r} is supported now. "
                "Train it again without that option."
            )
    return {name: value for name, value in values.items() if name not in RETIRED}


def differences(one: Run, other: Run) -> list[str]:
    """The options in which two runs differ, as the command line spells them."""
    names = [item.name for item in fields(Run) if getattr(one, item.name) != getattr(other, item.name)]
    return [f"--{name.replace('_', '-')} {getattr(one, name)} against {getattr(other, name)}" for name in names]


class RunFolder:
    """Where a run is kept: what it is, one line per epoch, its states, its result. Every write is whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return self.file(RESULT).exists()

    @property
    def begun(self) -> bool:
        return self.file(CONFIGURATION).exists()

    @contextlib.contextmanager
    def created(self, run: Run, facts: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder for a run that begins, and keep other processes from it.

        Args:
            facts: what else belongs beside the run: the data set's classes, the machine, the command.

        Raises:
            InvalidInput: the folder holds something already, or cannot be made.
        """
        self.refuse_begun()
        self.refuse_existing()
        with refusing_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self.refuse_begun()
            self.refuse_existing()
            write_json(self.file(CONFIGURATION), {"format": FORMAT, "run": described(run), **facts})
            yield

    def refuse_begun(self) -> None:
        """Refuse a folder that was free when the caller began to prepare its run."""
        if self.begun:
            raise Busy(f"{self.path} was begun by another process in the meantime: go on with --resume once that one stops")

    def refuse_existing(self) -> None:
        """Refuse a folder that holds a run, or anything else."""
        if self.begun:
            state = "a finished run" if self.finished else "an unfinished run"
            remedy = "choose another --output" if self.finished else "go on with --resume, or choose another --output"
            raise InvalidInput(f"{self.path} holds {state}, which is never overwritten: {remedy}")
        if self.path.exists() and (not self.path.is_dir() or any(map(is_foreign, self.path.iterdir()))):
            raise InvalidInput(f"{self.path} exists and is not a run: choose another --output, or an empty folder")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InvalidInput(f"{parent} cannot be written to: choose another --output, or change its permissions")

    def facts(self) -> dict[str, Any]:
        """Everything in the configuration file.

        Raises:
            InvalidInput: there is no such file, or it cannot be read.
        """
        path = self.file(CONFIGURATION)
        try:
            facts = json.loads(path.read_text())
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']} is not {FORMAT}")
            if not isinstance(facts["run"], dict) or not isinstance(facts["data"], dict):
                raise ValueError("its run or its data is not a table")
            return facts
        except FileNotFoundError:
            raise InvalidInput(f"{self.path} is not a run: no {CONFIGURATION} in it; give the folder of a run") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path} cannot be read as a run ({error}): restore it, or start the run anew") from error

    def run(self) -> Run:
        values = without_retired(self.file(CONFIGURATION), self.facts()["run"])
        known = {item.name: item for item in fields(Run)}
        odd = sorted(values.keys() ^ known.keys())
        odd = [name for name in odd if name in values or not known[name].metadata.get("later")]
        if odd:
            entry = f"unknown entry {odd[0]!r}" if odd[0] in values else f"no entry {odd[0]!r}"
            path = self.file(CONFIGURATION)
            raise InvalidInput(f"{path} has {entry}: it was altered, or written by another version of layerwise; restore it")
        return Run(**{name: check_value(self.file(CONFIGURATION), known[name], value) for name, value in values.items()})

    def execution(self) -> Execution:
        """How the run was carried out when it began."""
        known = {item.name: item for item in fields(Execution)}
        values = renamed(self.facts().get("execution", {}))
        return Execution(
            **{name: check_value(self.file(CONFIGURATION), known[name], values[name]) for name in known & values.keys()}
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder at the same time."""
        with locked_file(self.file(LOCK)):
            yield

    def append(self, record: Mapping[str, Any], name: str = LOG) -> None:
        """Add a line to the log, or to another file of a line per epoch."""
        with refusing_disk_errors(self.path), self.file(name).open("a") as log:
            log.write(json.dumps(record, allow_nan=False) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def log(self, name: str = LOG) -> list[dict[str, Any]]:
        """The whole lines of the log, or of another such file; one cut short by a kill is left out."""
        records = []
        if self.file(name).exists():
            for line in self.file(name).read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return records

    def truncate_log(self, epochs: int) -> None:
        """Drop what was logged after the state that training goes on from."""
        for name in (LOG, SEPARABILITY):
            kept = [record for record in self.log(name) if record["epoch"] <= epochs]
            if name == LOG or self.file(name).exists():
                with replacing(self.file(name)) as draft:
                    draft.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def result(self) -> dict[str, Any]:
        try:
            return {**json.loads(self.file(RESULT).read_text()), "run": str(self.path)}  # wherever it lies now
        except FileNotFoundError:
            raise InvalidInput(f"{self.path} has no result yet: finish it with --resume") from None
        except (ValueError, TypeError) as error:
            raise InvalidInput(
                f"{self.file(RESULT)} cannot be read ({error}): remove it and finish the run with --resume"
            ) from None


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a file's lock, which ends with the process at the latest.

    Raises:
        Busy: another process holds it.
    """
    with contextlib.ExitStack() as held:
        with refusing_disk_errors(path.parent):
            try:
                held.enter_context(FileLock(path, timeout=0))
            except Timeout:
                raise Busy(f"{path.parent} is being trained by another process: wait for it, or stop it first") from None
        yield


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole."""
    draft = path.with_name(path.name + DRAFT)
    with refusing_disk_errors(path):
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def refusing_disk_errors(path: Path) -> Iterator[None]:
    """Say a full disk or a missing permission in one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(
            f"{path} could not be written ({reason}): what was saved before is untouched; free space or change permissions, "
            "then start again (what was training: with --resume)"
        ) from error


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names of today, where a file has an older one."""
    items = [item for kind in (Run, Execution) for item in fields(kind)]
    names = {also.lstrip("-").replace("-", "_"): item.name for item in items for also in item.metadata.get("also", ())}
    return {names.get(name, name): value for name, value in values.items()}


def is_foreign(path: Path) -> bool:
    """Whether a file is none of those that a run leaves when it is killed before it has begun."""
    return path.name not in (LOCK, CONFIGURATION + DRAFT)


def field_type(item: Field[Any]) -> type:
    """The type that a field's text is read as, without None."""
    return (get_args(item.type) or (item.type,))[0]


def check_value(source: str | Path, item: Field[Any], value: Any) -> Any:
    """A field's value from a file, made of the field's type.

    Raises:
        InvalidInput: it is of another type.
    """
    wanted = field_type(item)
    if value is None and item.default is None:
        return None
    if wanted is str and isinstance(value, list):
        return ",".join(map(str, value))
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML reads 5e-4 as text
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise InvalidInput(f"{source}: {item.name} is {value!r}, which is not of type {wanted.__name__}: correct it")
    return value
