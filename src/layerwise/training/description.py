"""Description of a run beside its numbers: in its folder, in its result, and in words."""

from dataclasses import asdict
from typing import Any

from layerwise.core.audit import audit_steps, labels_in_pairs
from layerwise.core.learner import Learner
from layerwise.core.memory_format import summary
from layerwise.core.table import count
from layerwise.data import Splits
from layerwise.errors import Diverged
from layerwise.hierarchy import Hierarchy, parse_downsampling, parse_hierarchy
from layerwise.memory.streams import StepChoice
from layerwise.models import hierarchical, published_hierarchy
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Run
from layerwise.training.declared_options import options_in_full
from layerwise.training.machine import describe_device, describe_machine
from layerwise.training.origins import origins
from layerwise.training.prepare import Prepared
from layerwise.utils.sizes import format_size
from layerwise.utils.words import counted

AUDITED_IMAGES = 4  # of the first batch; with fewer, a contrastive loss has no gradient


def describe_session(
    prepared: Prepared, data: Splits, learner: Learner, formats: list[str]
) -> dict[str, Any]:
    """The record of a run beside the run itself: data, units, options in full, the machine."""
    return {
        "data": data.facts(),
        "units": [unit.name for unit in learner.units],
        "audit": audit_session(data, learner),
        "local": len(learner.units) > 1,
        "options": options_in_full(prepared.run),
        **origins(prepared.run),
        "layouts": formats,
        "execution": asdict(prepared.execution),
        **({"preset": prepared.preset} if prepared.preset else {}),
        **({"plan": prepared.plan} if prepared.plan else {}),
        **describe_machine(prepared.device),
    }


def audit_session(data: Splits, learner: Learner) -> dict[str, Any] | None:
    """The audit of the units' losses on a few images; None where a loss is not finite."""
    images = data.train.images(data.train.order(0)[0][:AUDITED_IMAGES], 0)
    labels = labels_in_pairs(len(images), learner.num_classes).to(images.device)
    try:
        audit = audit_steps(learner, images, labels)
    except Diverged:  # of so few images; the first step says so if it is of a batch too
        return None
    return audit.summary()


def choices_in_words(
    prepared: Prepared, learner: Learner, formats: list[str], choice: StepChoice | None
) -> str:
    """Words for what was chosen for a training: device, memory formats, how steps are made."""
    replicas = prepared.execution.replicas
    parts = (
        describe_device(prepared.device, prepared.run.amp),
        summary(formats),
        describe_steps(learner, choice),
        f"{replicas} replicas" if replicas > 1 else "",
    )
    return ", ".join(filter(None, parts))


def describe_steps(learner: Learner, choice: StepChoice | None) -> str:
    """Words for how steps are made; empty unless they are recorded, or their memory predicted.

    Args:
        choice: how they were chosen to be made, if their memory was predicted.
    """
    need = f", predicted {format_size(choice.predicted_bytes)}" if choice else ""
    if learner.captured is None:
        return f"steps made singly{need}" if choice else ""
    streams = max(1, len(learner.captured.streams))
    return f"recorded steps on {counted(streams, 'stream')}{need}"


def describe(prepared: Prepared, folder: RunFolder, learner: Learner) -> dict[str, Any]:
    """The run's name and main choices, as results show them."""
    run, local = prepared.run, len(learner.units) > 1
    hierarchy, plan = hierarchy_of(run), folder.facts().get("plan")
    return {
        "run": str(folder.path),
        "model": run.model,
        "hierarchy": list(hierarchy) if hierarchy else None,
        "downsample_after": list(parse_downsampling(run.downsample_after))
        if run.downsample_after
        else None,
        "data": run.data,
        "rule": run.rule,
        "loss": run.loss_in_words if local else "cross-entropy",
        "local": local,
        "span": learner.span,
        "head_parameters": sum(count(unit.loss) for unit in learner.units),
        "seed": run.seed,
        **({"plan": plan} if plan else {}),
    }


def hierarchy_of(run: Run) -> Hierarchy | None:
    """The run's hierarchy; None of a network that has none."""
    if run.hierarchy:
        return parse_hierarchy(run.hierarchy)
    return published_hierarchy(run.model) if run.model in hierarchical() else None
