"""Sweeps on workers: runs handed out, tried again, skipped; what is refused, in words."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from layerwise.cli import main
from layerwise.errors import Diverged, InvalidInput
from layerwise.experiments import engines, sweep
from layerwise.experiments.engines import ENGINES, create_engine
from layerwise.experiments.engines.base import Engine, WorkerDied
from layerwise.experiments.engines.task import MARK, Outcome, Task, mark_folder, task_of
from layerwise.experiments.engines.worker import carry_out
from layerwise.experiments.entry import Entry, entries
from layerwise.experiments.states import FAILED, FINISHED
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import train as train_run
from layerwise.utils.plugins import IMPORTED
from tests.test_cli import last_json, refusal

TINY = Run(
    model="vgg8",
    hierarchy="1,1,1,1,1",
    rule="global",
    width=1 / 16,
    train_images=40,
    epochs=1,
    batch_size=20,
    val_fraction=0.0,
)
COMPARE = "compare vgg8 --hierarchies 1,1,1,1,1 --rules global --seeds 2 --width 0.0625 --epochs 1"
COMPARE += " --train-images 40 --batch-size 20 --device cpu"


# imported by a worker, which it kills at the first state that is ever saved
DYING = """
import os, signal
from pathlib import Path
from layerwise.training import loop

save, died = loop.save, Path(__file__).with_name("died")

def save_and_die(*arguments):
    save(*arguments)
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)

loop.save = save_and_die
"""


@dataclass(kw_only=True)
class Here(Engine):
    """A stand-in: jobs are numbers, and each is done when its outcome is asked for.

    Args:
        deaths: how many workers die, from the first on.
    """

    deaths: int = 0
    place: ClassVar[str] = "this process"

    @contextmanager
    def connected(self, output: Path) -> Iterator[None]:
        self.tasks: list[Task] = []
        yield

    def start(self, tasks: Sequence[Task]) -> Sequence[int]:
        self.tasks += tasks
        return range(len(self.tasks) - len(tasks), len(self.tasks))

    def ended(self, jobs: Sequence[int]) -> Sequence[int]:
        return jobs[:1]

    def outcome(self, job: int) -> Outcome:
        if job < self.deaths:
            raise WorkerDied("killed")
        return carry_out(self.tasks[job])

    def leave(self, jobs: Sequence[int]) -> str:
        return f"{len(jobs)} go on"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "here", Here)
    monkeypatch.setitem(engines.PACKAGES, "here", "json")


def wanted(folder: Path, *seeds: int) -> list[Entry]:
    return entries([replace(TINY, seed=seed) for seed in seeds], folder, Execution())


def test_a_command_hands_its_runs_out_and_skips_what_is_done(here, tmp_path, capsys):
    command = [*COMPARE.split(), "--output", str(tmp_path), "--on", "here", "--json"]
    main(command)
    printed = capsys.readouterr().out
    assert "runs to train: 2; by this process" in printed
    assert len(re.findall("^finished on ", printed, re.MULTILINE)) == 2
    main([*command, "--on-option", "deaths=99"])  # no worker is asked for
    table = last_json(capsys)
    assert all(RunFolder(path).finished for path in table["runs"])
    assert RunFolder(table["runs"][0]).execution().cpu_threads == 1


def test_a_lost_worker_s_run_is_tried_again(tmp_path, capsys):
    assert sweep.sweep(wanted(tmp_path, 0, 1), engine=Here(deaths=2)) == {}
    printed = capsys.readouterr().out
    assert printed.count("worker lost, trying again: ") == 2
    assert "(killed)" in printed
    assert all(entry.state == FINISHED for entry in wanted(tmp_path, 0, 1))


def test_a_run_whose_workers_are_all_lost_is_refused_after_the_others(tmp_path):
    both = wanted(tmp_path, 0, 1)
    with pytest.raises(InvalidInput, match=r"its worker was lost once \(killed\)\. What it saved"):
        sweep.sweep(both, engine=Here(deaths=1, retries=0))
    assert [entry.state for entry in both] == ["to do", "finished"]


def test_what_goes_on_is_said_when_nobody_waits_any_longer(tmp_path, monkeypatch):
    def interrupted(self: Here, jobs: Sequence[int]) -> Sequence[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Here, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"stopped waiting; 2 go on\. Go on with"):
        sweep.sweep(wanted(tmp_path, 0, 1), engine=Here())


def test_runs_of_others_and_diverged_ones_are_left_out(tmp_path, monkeypatch):
    both = wanted(tmp_path, 0, 1)

    def train(prepared, *arguments, **options):
        if prepared.run.seed == 1:
            raise Diverged("unit 3: its loss is nan")
        return train_run(prepared, *arguments, **options)

    monkeypatch.setattr("layerwise.experiments.entry.train", train)
    with both[0].folder.created(both[0].run, {"data": {}, "units": []}):
        states = sweep.sweep(both, engine=Here())
        assert list(states.values()) == ["in another process", "diverged"]
        with pytest.raises(InvalidInput, match="is being trained by another process"):
            sweep.sweep(both, strict=True, engine=Here())


def task(folder: Path) -> Task:
    return task_of(wanted(folder, 0)[0], Execution(), mark_folder(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "0.0.1"}, "and the sweep was begun with 0.0.1. Install the same version"),
        ({"mark": "of another folder"}, "where this sweep keeps its runs. Give an --output that"),
        ({"place": Path("/nowhere/else")}, "it does not see /nowhere/else, where the command"),
        ({"imported": ("gone.py",)}, "Cannot import gone.py: there is no such file"),
        ({"execution": Execution(device="cuda:99")}, "Cannot use device 'cuda:99'"),
    ],
)
def test_a_worker_refuses_in_words_and_writes_nothing(tmp_path, changes, words):
    outcome = carry_out(replace(task(tmp_path), **changes))
    assert outcome.state == FAILED
    assert words in outcome.message
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_an_error_of_any_kind_comes_back_in_words(tmp_path, monkeypatch):
    def train(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("layerwise.experiments.entry.train", train)
    outcome = carry_out(task(tmp_path))
    assert outcome.state == FAILED
    assert "RuntimeError on " in outcome.message


def test_a_worker_uses_what_was_asked_for():
    assert Here(cpus=3).on_worker(Execution()) == Execution(device="cpu", cpu_threads=3)
    assert Here(gpus=0.5).on_worker(Execution()).device == "cuda"
    given = Execution(device="cuda:0", cpu_threads=4)
    assert Here(cpus=2).on_worker(given) == given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--on spark", "Cannot use --on 'spark': it is unknown. Accepted: local, slurm, ray"),
        ("--on here --on-option cpus=two", "cpus='two' (option of the engine 'here'): it is not"),
        ("--on here --on-option cpus=0", "cpus=0: it is too small. Give 1 or more."),
        ("--on here --on-option gpus=nan", "it is not finite"),
        ("--on here --on-option colour=red", "Cannot use --on-option 'colour': it is unknown."),
        ("--on here --on-option cpus", "Cannot use --on-option 'cpus': it is not NAME=VALUE"),
        ("--on-option cpus=2", "Cannot use --on-option cpus: runs are trained in turn"),
        ("--on slurm --on-option gpus=0.5", "Slurm gives whole GPUs"),
        ("--on slurm --on-option cluster=moon", "Accepted: slurm, local."),
        ("--on slurm", "submitit is not installed. Install it with pip install 'layerwise[slurm]'"),
        ("--on ray", "ray is not installed. Install it with pip install 'layerwise[ray]'."),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    here, words, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        engines, "find_spec", lambda name: None if name in ("submitit", "ray") else name
    )
    output = tmp_path / "runs"
    command = [*COMPARE.split(), "--output", str(output), *words.split()]
    assert message in refusal(capsys, *command)
    assert not output.exists()


@pytest.mark.slow
def test_slurm_s_local_stand_in_goes_on_after_a_kill(tmp_path, capfd, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setitem(IMPORTED, str(tmp_path / "dying.py"), "")
    wanted_entries = entries([replace(TINY, epochs=2)], tmp_path / "runs", Execution())
    sweep.sweep(wanted_entries, engine=create_engine("slurm", {"cluster": "local"}))
    assert "worker lost, trying again: " in capfd.readouterr().out
    assert wanted_entries[0].state == FINISHED
    logs = "".join(path.read_text() for path in (tmp_path / "runs/.slurm").glob("*_log.out"))
    assert "going on after epoch 1" in logs


@pytest.mark.slow
def test_ray_on_this_machine(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    entries = wanted(tmp_path, 0)
    sweep.sweep(entries, engine=create_engine("ray", {}))
    assert entries[0].state == FINISHED
