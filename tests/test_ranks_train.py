"""Training on several ranks: the bits of one process, resumed on any number of ranks, and ends."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.cli import main
from layerwise.core.unit import Unit
from layerwise.distributed import distribute, whole, world
from layerwise.distributed.messages import Message, Receiver, Sender
from layerwise.distributed.placement import balanced_ranks, parsed_ranks, rank_bytes
from layerwise.errors import Diverged, InvalidInput, LostRank
from layerwise.memory.accounting import persistent_bytes
from layerwise.memory.per_unit import predict_units
from layerwise.runs.folder import BEST, RESULT, WEIGHTS, RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import Interrupted, train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from tests.helpers import digits, learner, same_weights
from tests.ranks import StopAfter, free_port, on_ranks

CPU = Execution(device="cpu", cpu_threads=1, keep_memory=False)
RUN = Run(
    model="vgg8",
    rule="parallel",
    width=1 / 16,
    dropout=0.2,
    train_images=80,
    batch_size=16,
    epochs=2,
    lr=1e-3,
)


def carry_out(run: Run, path: Path, resume: bool = False, stop_after: int = 0, **how: Any) -> Any:
    progress = StopAfter(stop_after) if stop_after else Progress()
    prepared = prepare(run, replace(CPU, **how))
    return train(prepared, RunFolder(path), resume, progress)


def digests(path: Path) -> list[str]:
    return [hashlib.sha256((path / name).read_bytes()).hexdigest() for name in (WEIGHTS, BEST)]


def records(path: Path) -> list[Any]:
    changing = ("images_per_second", "seconds")
    return [
        {name: value for name, value in record.items() if name not in changing}
        for record in RunFolder(path).log()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    carry_out(RUN, path)
    return path


@pytest.mark.parametrize(
    ("size", "ranks"), [(2, None), pytest.param(3, "1,2,3", marks=pytest.mark.slow)]
)
def test_a_run_on_ranks_is_that_of_one_process(
    size: int, ranks: str | None, alone: Path, tmp_path: Path
) -> None:
    first, *others = on_ranks(in_folder, RUN, tmp_path / "run", ranks, size=size)
    assert others == [first] * (size - 1)
    assert digests(tmp_path / "run") == digests(alone)
    assert records(tmp_path / "run") == records(alone)
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".draft"]
    parts = [rank["units"] for rank in first["ranks"]]
    assert [first for first, _ in parts][1:] == [last + 1 for _, last in parts][:-1]
    assert all(
        rank["peak_memory_bytes"] < 2 * rank["predicted_memory_bytes"] for rank in first["ranks"]
    )


def test_frozen_features_are_kept_where_images_enter(tmp_path: Path) -> None:
    behind = replace(RUN, train_from="2", augment=False)
    carry_out(behind, tmp_path / "alone")
    on_ranks(in_folder, behind, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(tmp_path / "alone")


def in_folder(run: Run, path: Path, ranks: str | None = None) -> dict[str, Any]:
    return carry_out(run, path, ranks=ranks)


def stopped(path: Path, resume: bool, steps: int) -> str:
    with pytest.raises(Interrupted) as stop:
        carry_out(RUN, path, resume, stop_after=steps)
    return str(stop.value)


def resumed(path: Path) -> dict[str, Any]:
    return carry_out(RUN, path, resume=True)


def asking_to_resume_on_first(path: Path) -> Any:
    words = ["train", "vgg8", "--width", "0.0625", "--train-images", "80", "--batch-size", "16"]
    words += ["--epochs", "1", "--device", "cpu", "--cpu-threads", "1", "--rule", "parallel"]
    resume = ["--resume"] if world().first else []
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--output", str(path), *resume])
    return leaving.value.code


def test_ranks_of_which_one_resumes_another_run_are_refused_together(
    alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    assert on_ranks(asking_to_resume_on_first, tmp_path / "run") == [2, 2]


def test_a_stopped_run_goes_on_with_another_number_of_ranks(alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert "after 0 epochs and 2 batches" in stopped(path, False, 2)
    # all ranks stop after the batch at which the first told them so
    assert on_ranks(stopped, path, True, 2)[0].startswith("stopped after 1 epoch and 0 batches")
    first = on_ranks(stopped, path, True, 1, size=3)
    assert len(set(first)) == 1
    assert "stopped after 1 epoch and 2 batches" in first[0]
    resumed(path)
    assert digests(path) == digests(alone)
    assert records(path) == records(alone)


def ending(path: Path, how: str) -> Any:
    """Train, and end one rank in the second epoch."""
    step = Unit.step

    def failing(
        self: Unit, activations: Any, targets: Any, number: int, update: bool = True
    ) -> Any:
        if number == 7 and world().rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "diverges":
                raise Diverged("Cannot go on training: the loss is nan.")
            while not (path / "over").exists():  # the first rank has given this one up
                time.sleep(0.1)
        return step(self, activations, targets, number, update)

    pytest.MonkeyPatch().setattr(Unit, "step", failing)  # the process ends with its task
    try:
        return carry_out(RUN, path)
    except LostRank:
        (path / "over").touch()
        raise


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", "the connection to another rank was lost"),
        pytest.param("hangs", "another rank has not answered for 4 s", marks=pytest.mark.slow),
        pytest.param(
            "diverges",
            "rank 1 ended: Cannot go on training: the loss is nan",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_fails_ends_all_and_the_run_goes_on(
    how: str, words: str, alone: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    first, _ = on_ranks(ending, path, how, timeout=4.0 if how == "hangs" else 20.0)
    assert isinstance(first, LostRank)
    assert words in str(first)
    assert not RunFolder(path).has(RESULT)
    on_ranks(resumed, path)
    assert digests(path) == digests(alone)


def disagreeing(path: Path) -> Any:
    return carry_out(replace(RUN, lr=1e-3 * (1 + world().rank)), path)


def simultaneously(path: Path) -> Any:
    return carry_out(replace(RUN, rule="simultaneous"), path)


def in_one_unit(path: Path) -> Any:
    return carry_out(replace(RUN, at="1"), path)


def on_unequal_ranks(path: Path) -> Any:
    return carry_out(RUN, path, ranks="1,1")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (disagreeing, "configuration of rank 1 is not that of rank 0 (lr: 0.002 against 0.001)"),
        (simultaneously, "Cannot train by the rule 'simultaneous' on 2 ranks"),
        (in_one_unit, "Cannot place 1 units on 2 ranks: a rank would have none"),
        (on_unequal_ranks, "Cannot use ranks '1,1': there are 6 units and 2 ranks"),
    ],
)
def test_ranks_that_cannot_train_all_say_so_and_write_nothing(
    task: Any, words: str, tmp_path: Path
) -> None:
    for error in on_ranks(task, tmp_path / "run"):
        assert isinstance(error, InvalidInput)
        assert words in str(error)
    assert not (tmp_path / "run").exists()


def own_loop(optimizer: Any) -> tuple[bool, int, str]:
    local, alone = (learner("vgg8b", optimizer=optimizer) for _ in range(2))
    before = persistent_bytes(local)
    assert sum(map(len, distribute(local, run_ahead=1))) == len(local.units)
    for images, labels in digits().train.batches(0):
        local.step(images, labels)
        alone.step(images, labels)
    held = persistent_bytes(local)
    try:
        local.state_dict()
    except InvalidInput as error:
        refusal = str(error)
    with whole(local) as first:
        equal = not first or same_weights(local.model, alone.model)
        assert not first or local.state_dict()["units"] == alone.state_dict()["units"]
    local.step(images, labels)  # and goes on
    with whole(local):
        pass
    assert held < 3 * before  # with the optimizer's state; whole it would be
    return equal, held, refusal


def refilled() -> list[bool]:
    """A loop that fills one batch anew, with a generator of its own draws after distribute."""
    local, alone = (learner("plain", "infopro", optimizer=sgd) for _ in range(2))
    state = torch.get_rng_state()
    distribute(local, run_ahead=2)
    same = torch.equal(state, torch.get_rng_state())
    images, labels = torch.empty(16, 1, 8, 8), torch.empty(16, dtype=torch.int64)
    for own, own_labels in digits().train.batches(0):
        images.copy_(own)
        labels.copy_(own_labels)
        local.step(images, labels)
        alone.step(own, own_labels)
        images.fill_(float("nan"))
        labels.fill_(-1)
    with whole(local) as first:
        return [same, not first or same_weights(local.model, alone.model)]


def test_a_loop_may_fill_its_batch_anew_and_draws_as_in_one_process() -> None:
    assert on_ranks(refilled) == [[True, True]] * 2


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def test_own_loops_distribute_a_learner() -> None:
    results = on_ranks(own_loop, sgd)
    local = learner("vgg8b", optimizer=sgd)
    local.step(*next(digits().train.batches(0)))
    assert all(equal for equal, _, _ in results)
    held = [held for _, held, _ in results]
    assert persistent_bytes(local) <= sum(held) < 1.02 * persistent_bytes(local)
    assert "with layerwise.whole(learner)" in results[0][2]


def other_numbers_of_steps() -> None:
    local = learner("plain")
    distribute(local)
    images, labels = next(digits().train.batches(0))
    for _ in range(2 - world().rank):
        local.step(images, labels)
    with whole(local):
        pass


def test_ranks_that_make_other_numbers_of_steps_end() -> None:
    first, second = on_ranks(other_numbers_of_steps, timeout=5.0)
    assert isinstance(first, LostRank)
    assert "the first rank has made more steps" in str(second)


def passing(rounded: bool) -> list[Any]:
    cpu = torch.device("cpu")
    maps = torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last) / 3
    values = (maps, maps, (4, [5]), maps[:, :1], torch.arange(3, dtype=torch.uint8))
    if world().rank == 0:
        sender = Sender(1, 1, cpu, rounded)
        sender.send(Message(values, {"last": True}))
        sender.wait()
        return []
    got = Receiver(0, cpu, cpu, rounded).receive().values
    return [
        torch.equal(got[0], maps.bfloat16().float() if rounded else maps),
        got[0].stride() == maps.stride(),
        got[1] is got[0],
        got[2] == (4, [5]),
        torch.equal(got[3].bfloat16(), maps[:, :1].bfloat16()),
        torch.equal(got[4], values[4]),
    ]


@pytest.mark.parametrize("rounded", [False, True])
def test_messages_arrive_as_they_lay_in_memory(rounded: bool) -> None:
    assert on_ranks(passing, rounded)[1] == [True] * 6


def running_ahead() -> int:
    local = learner("plain")
    distribute(local, run_ahead=2)
    images, labels = next(digits().train.batches(0))
    begin, made = time.monotonic(), 0
    for _ in range(8):
        if world().rank == 1 and not made:
            time.sleep(1)
        local.step(images, labels)
        made += time.monotonic() - begin < 0.8
    local.stage.pause()
    return made


@pytest.mark.slow
def test_a_rank_runs_ahead_within_its_bound() -> None:
    assert on_ranks(running_ahead) == [2, 0]


def test_placement_balances_what_ranks_need() -> None:
    assert balanced_ranks([4, 1, 1, 1, 1], 2) == [range(0, 1), range(1, 5)]
    assert parsed_ranks("1, 3", 4, 2) == [range(0, 1), range(1, 4)]
    for text in ("1,2", "0,4", "2", "a,b", "2,2,"):
        with pytest.raises(InvalidInput, match="that add up to 4"):
            parsed_ranks(text, 4, 2)


def test_memory_of_ranks_is_predicted() -> None:
    local = learner("vgg8b")
    needs = predict_units(local, 16)
    images, labels = next(digits().train.batches(0))
    local.step(images, labels)
    assert sum(need.persistent for need in needs) == persistent_bytes(local)
    one, two = rank_bytes(needs, [range(0, 3), range(3, len(needs))], 2)
    assert max(one, two) < rank_bytes(needs, [range(len(needs))], 2)[0]


def test_ranks_in_one_process_change_nothing() -> None:
    local = learner("plain")
    assert layerwise.distribute(local) == [range(len(local.units))]
    with layerwise.whole(local) as first:
        assert first
    assert local.stage is None


KILLS = """
import os, signal
from layerwise.core.unit import Unit
step = Unit.step
def failing(self, *arguments):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and arguments[2:3] == (7,):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
Unit.step = failing
"""


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(
    hosts: int, alone: Path, tmp_path: Path
) -> None:
    """On two hosts, only that of the killed rank counts the restart."""
    (tmp_path / "kills.py").write_text(KILLS)
    options = "--rule parallel --width 0.0625 --dropout 0.2 --train-images 80 -b 16 --epochs 2"
    options += f" --lr 1e-3 --device cpu --cpu-threads 1 --import {tmp_path / 'kills.py'}"
    torchrun = f"torch.distributed.run --nnodes {hosts} --nproc-per-node {2 // hosts}"
    torchrun += f" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --max-restarts 1"
    command = f"-m {torchrun} -m layerwise train vgg8 {options} --output {tmp_path / 'run'}"
    programs = [
        subprocess.Popen(
            [sys.executable, *command.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(hosts)
    ]
    outputs = [program.communicate(timeout=180) for program in programs]
    assert [program.returncode for program in programs] == [0] * hosts, outputs
    printed = "".join(output for output, _ in outputs)
    assert "going on after epoch 1" in printed
    assert "rank 1: units" in printed
    assert printed.count("test accuracy of the last epoch") == 1
    assert digests(tmp_path / "run") == digests(alone)


def test_other_commands_refuse_ranks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from layerwise.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        main(["list", "losses"])
    assert end.value.code == 2
    assert "Cannot run `layerwise list` on 2 ranks" in capsys.readouterr().err
