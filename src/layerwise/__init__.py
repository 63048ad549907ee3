"""Train convolutional networks without global backpropagation: any network, any local loss, any
order of updates.

Names are loaded when first used, so that ``import layerwise`` and ``layerwise --help`` do not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.analysis.separability import separability, separability_over_epochs
    from layerwise.core.cuda_graphs import CapturedSteps
    from layerwise.core.learner import Learner
    from layerwise.core.locality import Audit
    from layerwise.core.memory_format import lay_out, set_memory_format
    from layerwise.core.result import StepResult
    from layerwise.core.split import Chain, split
    from layerwise.core.teacher import Teacher
    from layerwise.core.unit import Unit
    from layerwise.data import DATASETS, Arrays, DataSet, ImageFormat
    from layerwise.distributed import distribute, joined, replicate, whole
    from layerwise.errors import CannotSplit, Diverged, InvalidInput, LostRank, MissingData
    from layerwise.losses import (
        LOSSES,
        Changing,
        Evaluated,
        Output,
        Pred,
        PredSim,
        PredSimLite,
        Sim,
        Site,
        Targets,
    )
    from layerwise.measures import MEASURES, linear_cka
    from layerwise.models import MODELS, create_model, list_models
    from layerwise.profiling.audit import audit
    from layerwise.profiling.budget import localize
    from layerwise.profiling.profile import predict_peak
    from layerwise.rules import RULES, Position, Rule, Tick
    from layerwise.rules.updates import updates
    from layerwise.utils.allocator import keep_freed_memory

    __version__: str

HOMES = {
    "analysis.separability": ("separability", "separability_over_epochs"),
    "core.cuda_graphs": ("CapturedSteps",),
    "core.learner": ("Learner",),
    "core.locality": ("Audit",),
    "core.memory_format": ("lay_out", "set_memory_format"),
    "core.result": ("StepResult",),
    "core.split": ("Chain", "split"),
    "core.teacher": ("Teacher",),
    "core.unit": ("Unit",),
    "distributed": ("distribute", "joined", "replicate", "whole"),
    "data": ("DATASETS", "Arrays", "DataSet", "ImageFormat"),
    "errors": ("CannotSplit", "Diverged", "InvalidInput", "LostRank", "MissingData"),
    "losses": (
        *("LOSSES", "Changing", "Evaluated", "Output", "Pred", "PredSim", "PredSimLite", "Sim"),
        *("Site", "Targets"),
    ),
    "measures": ("MEASURES", "linear_cka"),
    "models": ("MODELS", "create_model", "list_models"),
    "profiling.audit": ("audit",),
    "profiling.budget": ("localize",),
    "profiling.profile": ("predict_peak",),
    "rules": ("RULES", "Position", "Rule", "Tick"),
    "rules.updates": ("updates",),
    "utils.allocator": ("keep_freed_memory",),
}

__all__ = [
    "DATASETS",
    "LOSSES",
    "MEASURES",
    "MODELS",
    "RULES",
    "Arrays",
    "Audit",
    "CannotSplit",
    "CapturedSteps",
    "Chain",
    "Changing",
    "DataSet",
    "Diverged",
    "Evaluated",
    "ImageFormat",
    "InvalidInput",
    "Learner",
    "LostRank",
    "MissingData",
    "Output",
    "Position",
    "Pred",
    "PredSim",
    "PredSimLite",
    "Rule",
    "Sim",
    "Site",
    "StepResult",
    "Targets",
    "Teacher",
    "Tick",
    "Unit",
    "audit",
    "create_model",
    "distribute",
    "joined",
    "keep_freed_memory",
    "lay_out",
    "linear_cka",
    "list_models",
    "localize",
    "predict_peak",
    "replicate",
    "separability",
    "separability_over_epochs",
    "set_memory_format",
    "split",
    "updates",
    "whole",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = import_module("layerwise.utils.version").version()
        return globals()[name]
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"layerwise.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'layerwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
