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
    from layerwise.layouts import lay_out
    from layerwise.learner import Learner, localize
    from layerwise.losses import LOSSES, Evaluated, Output, Pred, PredSim, Sim, Site, Targets
    from layerwise.measures import MEASURES, linear_cka
    from layerwise.models import create_model, list_models
    from layerwise.profile import predict_peak
    from layerwise.rules import RULES
    from layerwise.survey import separability, separability_over_epochs
    from layerwise.units import StepResult, Unit

    __version__: str

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
    "layouts": ("lay_out",),
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
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = installed_version()
        return globals()[name]
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"layerwise.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'layerwise' has no attribute {name!r}")


def installed_version() -> str:
    """The version that was installed, as ``pyproject.toml`` says; ``0+unknown`` of a bare copy."""
    from importlib.metadata import PackageNotFoundError, version  # here: slow to import

    try:
        return version("layerwise")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
