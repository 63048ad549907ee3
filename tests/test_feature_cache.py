"""What is kept of features: that it is the same, or near enough; that it stays under its limit;
that nothing of it is left.
"""

import copy
import errno
import gc
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.cli import main
from layerwise.core.memory_format import set_memory_format
from layerwise.errors import InvalidInput
from layerwise.rules import RULES
from layerwise.rules.base import Position
from layerwise.rules.feature_cache import Column, Keeping, Kind, cached_features, kind_of
from layerwise.runs.folder import RESULT, STATE, WEIGHTS, RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.feature_keeping import FEATURES, feature_keeping
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.utils.allocator import free_memory
from layerwise.utils.options import Options
from layerwise.utils.sizes import format_size, parse_size
from tests.helpers import digits, learner, same_weights, ticks

SMALL = Run(
    model="resnet18",
    hierarchy="1,1,1,1",
    output_layer="separate",
    width=1 / 16,
    train_images=60,
    batch_size=16,
    epochs=2,
    rule="sequential",
    rule_options=Options(cache=True),
    views=2,
)
COMMAND = (
    "train resnet18 --output-layer separate --hierarchy 1,1,1,1 --width 0.0625 --train-images 60 "
    "--batch-size 16 --rule sequential --cache --views 2 --cpu-threads 1 --device cpu"
)


def carry_out(
    run: Run,
    path: Path,
    execution: Execution,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    return train(prepare(run, execution), RunFolder(path), resume, progress or Progress())


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept its features in memory, and was not stopped."""
    path = tmp_path_factory.mktemp("two") / "run"
    carry_out(SMALL, path, Execution(device="cpu"))
    return path


def keeping_of(execution: Execution, path: Path) -> Keeping:
    """What a run keeps features in."""
    return feature_keeping(prepare(SMALL, execution), path)["keeping"]


def digest(path: Path) -> str:
    return hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()


def still_mapped() -> bool:
    """Whether this process still holds a file of features, named or not."""
    gc.collect()
    maps = Path("/proc/self/maps")
    return maps.exists() and "features" in maps.read_text()


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4), (2, 3, 1), (7, 1, 1), ()], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str
)
def test_what_is_kept_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = (torch.randn(12, *shape) * 10).to(dtype)
    kind = kind_of(values)
    column = Column(kind, torch.empty(24, kind.row_bytes + 16, dtype=torch.uint8), 8, values.device)
    for part in range(3):  # of four images each, of the second view
        column.write(values[4 * part : 4 * part + 4], 12 + 4 * part)
    order = torch.randperm(12)
    back = column.read(12 + order)
    assert back.dtype == dtype
    assert torch.equal(back, values[order])


def test_maps_come_back_in_their_memory_format() -> None:
    torch.manual_seed(0)
    maps = torch.randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last)
    kind = kind_of(maps)
    assert kind == Kind(maps.shape[1:], torch.float32, channels_last=True)
    column = Column(kind, torch.empty(4, kind.row_bytes, dtype=torch.uint8), 0, maps.device)
    column.write(maps, 0)
    back = column.read(torch.tensor([2, 0]))
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(back, maps[[2, 0]])


@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", ["resnet18", "vgg8b", "pre-activation"])
def test_in_mixed_precision_kept_features_are_those_computed(name: str, memory_format: str) -> None:
    data = digits(train_images=60, batch_size=20, views=2)
    computed, kept = learner(name, amp=torch.bfloat16), learner(name, amp=torch.bfloat16)
    for one, options in (
        (computed, {}),
        (kept, {"cache": True, "keeping": Keeping(say=lambda line: None)}),
    ):
        set_memory_format(one, memory_format)
        history = ticks("sequential", one, data.train, 2, **options)
        assert len(history) == 2 * 3 * len(one.units)
    assert same_weights(computed.model, kept.model)


def size_of(name: str, batches: Any) -> int:
    return cached_features(learner(name), batches, Keeping(say=lambda line: None))().size(1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "pre-activation"])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.0])
def test_what_exceeds_the_limit_is_computed(name: str, share: float, tmp_path: Path) -> None:
    data, lines = digits(train_images=48, views=2), list[str]()
    whole = size_of(name, data.train)
    limit = int(share * whole) + 1
    plain, limited = learner(name), learner(name)
    ticks("sequential", plain, data.train, epochs=2)
    keeping = Keeping(
        tmp_path / "features" if share == 0.3 else None, limit, "the limit", lines.append
    )
    history = ticks("sequential", limited, data.train, epochs=2, cache=True, keeping=keeping)
    assert same_weights(plain.model, limited.model)
    assert max(tick.kept_bytes for tick in history) <= limit
    assert len(lines) == 1
    assert f"cache: {format_size(whole)} of features exceed the limit" in lines[0]
    assert ("from unit" in lines[0]) == (share > 0)
    assert ("every unit's inputs are computed" in lines[0]) == (share == 0)


def test_the_size_is_what_was_said_and_there_is_one_table() -> None:
    data, local, lines = digits(views=3), learner("resnet18"), list[str]()
    features = cached_features(local, data.train, Keeping(None, 10**9, say=lines.append))()
    table = features.rows.data_ptr()
    peak = 0
    for depth in range(len(local.units)):
        features.advance(local.units[:depth])
        peak = max(peak, features.kept_bytes)
        assert features.rows.data_ptr() == table
    assert peak == features.size(1)
    assert lines == [f"cache: {format_size(features.size(1))} of features are kept in memory"]


def refuse(number: int) -> Any:
    def refusing(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize(
    ("function", "error"),
    [("posix_fallocate", errno.ENOSPC), ("open", errno.EACCES), ("posix_fallocate", errno.EFBIG)],
)
def test_a_file_that_cannot_be_made_is_refused(
    function: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, lines = digits(views=2), list[str]()
    monkeypatch.setattr(
        f"layerwise.rules.feature_cache.os.{function}", refuse(error), raising=False
    )
    keeping = Keeping(tmp_path / "features", say=lines.append)
    with pytest.raises(InvalidInput, match=f"in {tmp_path}: {os.strerror(error)}"):
        ticks("sequential", learner("resnet18"), data.train, 2, cache=True, keeping=keeping)
    assert not lines
    assert not list(tmp_path.iterdir())


def test_a_full_memory_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    data, lines = digits(views=1), list[str]()
    make = cached_features(learner("resnet18"), data.train, Keeping(say=lines.append))

    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(torch, "empty", full)
    assert make().rows is None
    assert (
        "in memory (not enough memory), so every unit's inputs are computed for every batch"
        in lines[0]
    )


def test_without_posix_fallocate_the_file_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.rules.feature_cache import nameless_file

    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    table = nameless_file(tmp_path / "features", (1 << 20) + 12345)
    assert table.shape == ((1 << 20) + 12345,)
    assert not table.any()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_interrupted_and_resumed_is_uninterrupted(share: float) -> None:
    data = digits(train_images=90, views=2)
    sizes = cached_features(learner("resnet18"), data.train, Keeping(say=lambda line: None))()
    options = {"cache": True, "keeping": Keeping(None, int(share * sizes.size(1)))}
    whole = learner("resnet18")
    history = ticks("sequential", whole, data.train, 2, **options)
    first = learner("resnet18")
    order = RULES["sequential"].order(
        first, data.train, 2, lambda done: 1 - done / 2, Position(), **options
    )
    for _ in range(2 * len(history) // 3):
        tick = next(order)
    state = copy.deepcopy(first.state_dict())
    second = learner("resnet18")
    second.load_state_dict(state)
    ticks("sequential", second, data.train, 2, tick.after, **options)
    assert same_weights(whole.model, second.model)


def test_numbers_between_units_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    local, data = learner("plain"), digits(views=1)
    monkeypatch.setattr(
        local.units[0], "forward", lambda activations: (local.units[0].piece(*activations), 3)
    )
    with pytest.raises(InvalidInput, match="Leave --cache out"):
        RULES["sequential"].order(local, data.train, 1, lambda done: 1.0, cache=True)


class Watch(Progress):
    """Looks into a folder after every step, and may end the training by an error."""

    def __init__(self, folder: Path, fail_after: int = -1) -> None:
        self.folder, self.left, self.seen = folder, fail_after, set[str]()

    def tick(self, tick: Any, meter: Any) -> None:
        self.seen |= {path.name for path in self.folder.iterdir()}
        self.left -= 1
        if not self.left:
            raise OverflowError("stop here")


def test_the_file_is_never_seen_and_always_freed(two_epochs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    execution = Execution(device="cpu", cache_dir=str(folder))
    watch = Watch(folder, 30)
    with pytest.raises(OverflowError):
        carry_out(SMALL, tmp_path / "run", execution, progress=watch)
    watched = watch.seen
    assert not still_mapped()
    result = carry_out(SMALL, tmp_path / "run", execution, True, watch)
    assert not any(FEATURES in name for name in watched | watch.seen)
    assert not list(folder.iterdir())
    assert not still_mapped()
    assert RunFolder(two_epochs).result()["sha256"] == result["sha256"]


def test_a_leftover_in_a_shared_folder_goes_with_its_run_alone(tmp_path: Path) -> None:
    execution = Execution(device="cpu", cache_dir=str(tmp_path))
    files = [keeping_of(execution, tmp_path / name).file for name in ("run", "other")]
    for file in files:
        file.write_bytes(b"")
    carry_out(replace(SMALL, epochs=1), tmp_path / "run", execution)
    assert [file.exists() for file in files] == [False, True]


class Removes(Progress):
    """Removes a folder when training begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, *_: object) -> None:
        self.folder.rmdir()


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("damage", ["full", "gone", "folder"])
def test_features_that_cannot_be_written_are_refused_and_the_run_goes_on_elsewhere(
    damage: str, two_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "features", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    execution = Execution(device="cpu", cache_dir=str(folder))
    if damage == "full":
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    elif damage == "folder":
        keeping_of(execution, tmp_path / "run").file.mkdir()
    progress = Removes(folder) if damage == "gone" else Progress()
    with pytest.raises(InvalidInput, match=r"Cannot keep .* of features in .*: .*--cache-dir"):
        carry_out(SMALL, tmp_path / "run", execution, progress=progress)
    monkeypatch.undo()
    assert not still_mapped()
    moved = Execution(device="cpu", cache_dir=str(elsewhere))
    carry_out(SMALL, tmp_path / "run", moved, True)
    assert digest(tmp_path / "run") == digest(two_epochs)


def start(path: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "layerwise", *COMMAND.split(), "--output", str(path), *more]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (path / STATE).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def six_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "run"
    carry_out(replace(SMALL, epochs=6), path, Execution(device="cpu"))
    return path


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_program_leaves_no_features(
    stop: signal.Signals, six_epochs: Path, tmp_path: Path
) -> None:
    folder, path = tmp_path / "features", tmp_path / "run"
    folder.mkdir()
    options = ["--cache-dir", str(folder), "--epochs", "6"]
    process = start(path, *options)
    if stop == signal.SIGKILL:
        time.sleep(0.5)  # into a later unit
    process.send_signal(stop)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert f" of features are kept in a nameless file in {folder}" in errors
    assert not (path / RESULT).exists()
    assert not list(folder.iterdir())
    assert not (path / FEATURES).exists()
    torch.set_num_threads(1)
    run = replace(SMALL, epochs=6)
    carry_out(run, path, RunFolder(path).execution(), True)
    assert digest(path) == digest(six_epochs)
    assert not list(folder.iterdir())


def test_a_limit_is_said_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "run"), "--epochs", "1", "--cache-limit", "20kB"]
    main([*COMMAND.split(), *options])
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "of features exceed the limit of 20 kB: units 1 to" in errors


@pytest.mark.parametrize(
    ("device", "place"), [("cpu", "memory"), ("auto", "memory"), ("cpu", "disk")]
)
def test_no_more_is_kept_in_memory_than_is_free(
    device: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.training.feature_keeping.free_memory", lambda: 10**6)
    cache_dir = str(tmp_path) if place == "disk" else None
    execution = Execution(device=device, cache_dir=cache_dir, cache_limit="1GB")
    keeping = keeping_of(execution, tmp_path)
    scarce = place == "memory" and (device == "cpu" or not torch.cuda.is_available())
    expected = (
        (800_000, "the 800 kB of free memory that can be spared")
        if scarce
        else (10**9, "the limit of 1 GB")
    )
    assert (keeping.limit, keeping.bound) == expected
    monkeypatch.setattr("layerwise.training.feature_keeping.free_memory", lambda: None)
    assert keeping_of(execution, tmp_path).limit == 10**9


def test_free_memory_is_what_the_machine_and_its_group_leave(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    proc, group = tmp_path / "proc", tmp_path / "sys/fs/cgroup"
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal:  5000 kB\nMemAvailable:    2000 kB\n")
    assert free_memory(tmp_path) == 2000 * 1024
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("600\n")
    (group / "memory.stat").write_text("anon 400\ninactive_file 100\nactive_file 100\n")
    assert free_memory(tmp_path) == 2000 * 1024
    (group / "memory.max").write_text("1500\n")
    assert free_memory(tmp_path) == 1000
    job = group / "slice/job_1"  # a group within that one
    job.mkdir(parents=True)
    (proc / "self").mkdir()
    (proc / "self/cgroup").write_text("0::/slice/job_1\n")
    assert free_memory(tmp_path) == 1000
    for name, text in (("max", "700"), ("current", "500"), ("stat", "inactive_file 0")):
        (job / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path) == 200
    (group / "memory.max").write_text("100\n")
    assert free_memory(tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5 kB", 1500),
        ("1.5KB", 1500),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--cache-limit", text) == size
    assert parse_size("--cache-limit", format_size(size)) == size


@pytest.mark.parametrize("size", [7, 795_001, 999_600, 1_150_000, 123_456_789, 10**18])
def test_a_size_that_is_asked_for_suffices(size: int) -> None:
    assert size <= parse_size("--memory", format_size(size, up=True)) <= 1.01 * size + 1
    assert "e+" not in format_size(size)
    assert not format_size(size).startswith("1000 ")


def test_sizes_may_be_binary() -> None:
    assert parse_size("--memory", "1.5GiB") == 3 * 2**29


@pytest.mark.parametrize(
    "text", ["", "GB", "4", "0GB", "-1GB", "4GiX", "4 G", "1e9B", "nan", "4GB4", "٤GB", "0.1B"]
)
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(
        InvalidInput,
        match=r"--cache-limit '.*': it is not a size\. Give a number above 0 with one of",
    ):
        parse_size("--cache-limit", text)
