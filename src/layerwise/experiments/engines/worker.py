"""A task's training in a worker."""

import os
import socket
import traceback

from layerwise.errors import Busy, CannotSplit, Diverged, InvalidInput
from layerwise.experiments.engines.task import MARK, Outcome, Task
from layerwise.experiments.entry import Entry, train_entry
from layerwise.experiments.states import DIVERGED, ELSEWHERE, FAILED, FINISHED
from layerwise.runs.folder import RunFolder
from layerwise.training.prepare import prepare
from layerwise.utils.plugins import import_files
from layerwise.utils.version import version


def carry_out(task: Task) -> Outcome:
    """Train a run to its end, in a worker. What went wrong comes back in words.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    host = socket.gethostname()
    try:
        check_worker(task, host)
        import_files(task.imported)
        prepared = prepare(task.run, task.execution)
        train_entry(Entry(prepared, RunFolder(task.folder), task.label))
        return Outcome(FINISHED, host)
    except Busy as error:
        return Outcome(ELSEWHERE, host, str(error))
    except Diverged as error:
        return Outcome(DIVERGED, host, str(error))
    except (InvalidInput, CannotSplit) as refusal:
        return Outcome(FAILED, host, str(refusal))
    except Exception as error:  # of any kind: its sender would see no more than a lost worker
        traceback.print_exc()
        message = f"Cannot finish {task.label}: {type(error).__name__} on {host} ({error})."
        return Outcome(FAILED, host, message)


def check_worker(task: Task, host: str) -> None:
    """Go to the folder that the command was given in.

    Raises:
        InvalidInput: this machine does not see the sweep's folders, or has another version.
    """
    if task.version != version():
        raise InvalidInput(
            f"Cannot train on {host}: it has layerwise {version()}, and the sweep was begun with "
            f"{task.version}. Install the same version on all machines."
        )
    output = task.folder.parent
    mark = output / MARK
    if not mark.is_file() or mark.read_text() != task.mark:
        raise InvalidInput(
            f"Cannot train on {host}: it does not see {output}, where this sweep keeps its runs. "
            "Give an --output that all machines share."
        )
    if not task.place.is_dir():
        raise InvalidInput(
            f"Cannot train on {host}: it does not see {task.place}, where the command was given. "
            "Give it in a folder that all machines share."
        )
    os.chdir(task.place)
