"""Train convolutional networks without global backpropagation: any network, any local loss, any order of updates.

Names are loaded when first used, so that ``import layerwise`` and ``layerwise --help`` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.allocator import keep_freed_memory
    from layerwise.captured import CapturedSteps
    from layerwise.chain import Chain, split
    from layerwise.errors import CannotSplit, Diverged, InvalidInput, MissingData
    from layerwise.learner import Learner, localize
    from layerwise.losses import LOSSES, Evaluated, Output, Pred, PredSim, Sim, Site, Targets
    from layerwise.measures import MEASURES, linear_cka
    from layerwise.memory_format import lay_out, set_memory_format
    from layerwise.models import create_model, list_models
    from layerwise.profile import predict_peak
    from layerwise.rules import RULES
    from layerwise.survey import separability, separability_over_epochs
    from layerwise.units import StepResult, Unit

HOMES = {
    "allocator": ("keep_freed_memory",),
    "captured": ("CapturedSteps",),
    "errors": ("CannotSplit", "Diverged", "InvalidInput", "MissingData"),
    "losses": ("LOSSES", "Evaluated", "Output", "Pred", "PredSim", "PredSimLite", "Sim", "Site", "Targets"),
    "measures": ("MEASURES", "linear_cka"),
    "models": ("create_model", "list_models"),
    "rules": ("RULES",),
    "profile": ("predict_peak",),
    "chain": ("Chain", "split"),
    "memory_format": ("lay_out", "set_memory_format"),
    "learner": ("Learner", "localize"),
    "survey": ("separability", "separability_over_epochs"),
    "units": ("StepResult", "Unit"),
}

__all__ = [
    "LOSSES",
    "MEASURES",
    "RULES",
    "CannotSplit",
    "CapturedSteps",
    "Chain",
    "Diverged",
    "Evaluated",
    "InvalidInput",
    "Learner",
    "MissingData",
    "Output",
    "Pred",
    "PredSim",
    "PredSimLite",
    "Sim",
    "Site",
    "StepResult",
    "Targets",
    "Unit",
    "create_model",
    "keep_freed_memory",
    "lay_out",
    "linear_cka",
    "list_models",
    "localize",
    "predict_peak",
    "separability",
    "separability_over_epochs",
    "set_memory_format",
    "split",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"layerwise.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'layerwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
