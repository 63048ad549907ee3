"""Steps of a run: recorded or made singly, and the limit of memory that they keep to."""

from collections.abc import Mapping

from layerwise.core.cuda_graphs import CapturedSteps
from layerwise.core.learner import Learner
from layerwise.memory.streams import MOST_STREAMS, StepChoice, choose_streams, step_bytes
from layerwise.rules import RULES
from layerwise.runs.run import Execution, Run
from layerwise.utils.device import device_of
from layerwise.utils.sizes import Bytes, parse_size


def memory_limit(run: Run, execution: Execution) -> Mapping[str, Bytes]:
    """The limit of a step's memory, as the argument of a rule that takes one; nothing for others.

    Raises:
        InvalidInput: it is not a size.
    """
    limit = step_limit(execution)
    return {} if limit is None or not RULES[run.rule].takes_limit else {"limit": limit}


def step_limit(execution: Execution) -> Bytes | None:
    """The most bytes of a step that ``--memory`` allows, or None.

    Raises:
        InvalidInput: it is not a size.
    """
    return None if execution.memory is None else Bytes(parse_size("--memory", execution.memory))


def record_steps(learner: Learner, execution: Execution) -> None:
    """Let a learner's steps be recorded if it is on a GPU and the run asks for it."""
    if execution.graphs and not learner.windowed and device_of(learner.model).type == "cuda":
        learner.captured = CapturedSteps(learner, execution.streams or 1)


def choose_steps(learner: Learner, run: Run, execution: Execution) -> StepChoice | None:
    """Let recorded steps overlap on as many streams as keep to the limit of memory.

    It is called when the rule has been given the learner, since some rules make steps singly.

    Returns:
        How steps are made, if their memory was predicted: it is where steps are recorded and
        several streams could be used and nobody says how many, or where there is a limit.

    Raises:
        InvalidInput: not even a step made singly keeps to ``execution.memory``.
    """
    limit = step_limit(execution)
    told = execution.streams is not None or len(learner.units) == 1
    if learner.captured is None or (limit is None and told):
        return None
    computed = -(-run.batch_size // run.rule_options.get("micro_batches", 1))
    most = execution.streams or MOST_STREAMS
    choice = choose_streams(step_bytes(learner, computed), limit, most)
    learner.captured = CapturedSteps(learner, choice.streams) if choice.streams else None
    return choice
