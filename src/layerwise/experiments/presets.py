"""Published settings by name: what a program trains, what was published, how ours differs."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from layerwise.errors import InvalidInput, choose
from layerwise.runs.command import differences
from layerwise.runs.run import Run
from layerwise.utils.options import Options
from layerwise.utils.words import plus_minus


@dataclass(frozen=True)
class Preset:
    """A published training.

    Attributes:
        name: such as ``infopro-resnet32-k4``.
        source: paper and program.
        model: network it was published for.
        units: number of units that the program trains, whatever its option says.
        error: published test error in percent; None: no figure could be confirmed.
        deviation, seeds: of the error, where they are published.
        figure: where the error was read.
        settings: options as the command line spells them, without their dashes.
        differs: what the program does that these settings do not.
    """

    name: str
    source: str
    model: str
    units: int
    settings: Mapping[str, Any]
    error: float | None = None
    deviation: float | None = None
    seeds: int | None = None
    figure: str = ""
    differs: tuple[str, ...] = ()

    @property
    def run(self) -> Run:
        """The run that the settings describe."""
        values = {name.replace("-", "_"): value for name, value in self.settings.items()}
        own = {item.name for item in fields(Run)}
        described = {name: value for name, value in values.items() if name in own}
        options = {name: value for name, value in values.items() if name not in own}
        return replace(Run(model=self.model, **described), loss_options=Options(options))

    @property
    def published(self) -> str:
        """The published error in words."""
        if self.error is None:
            return "no published error could be confirmed"
        seeds = f" of {self.seeds} runs" if self.seeds else ""
        error = f"{self.error:.2f}{plus_minus(self.deviation)} %"
        return f"published test error {error}{seeds} ({self.figure})"

    @property
    def text(self) -> str:
        """A few words for ``layerwise list presets``."""
        run = self.run
        return f"{run.model} on {run.data}, {run.loss}, {self.units} units; {self.published}"

    def record(self, run: Run) -> dict[str, Any]:
        """All of it, and the options in which a run departs from it, for the run's record."""
        return {**asdict(self), "changed": differences(run, self.run)}


@cache
def presets() -> dict[str, Preset]:
    """Every preset by its name, in the order of the table."""
    table = tomllib.loads((files("layerwise.experiments") / "presets.toml").read_text("utf-8"))
    return {name: read(name, entry, table["protocols"]) for name, entry in table["presets"].items()}


def read(name: str, entry: dict[str, Any], protocols: Mapping[str, Any]) -> Preset:
    """A preset from its entry: what its protocol says, and what it says itself."""
    own = dict(entry)
    shared = protocols[own.pop("protocol")]
    settings = {**shared["settings"], **own.pop("settings")}
    if "at" in settings:
        settings["at"] = expanded(settings["at"])
    differs = (*own.pop("differs", ()), *shared["differs"])
    rest = {key: value for key, value in shared.items() if key not in ("settings", "differs")}
    return Preset(name=name, settings=settings, differs=differs, **{**rest, **own})


def expanded(at: str) -> str:
    """Module paths joined by commas, with ranges such as ``stages.0.3-5`` written out."""
    paths = []
    for path in at.split(", "):
        if ends := re.fullmatch(r"(.*\.)(\d+)-(\d+)", path):
            paths += [f"{ends[1]}{number}" for number in range(int(ends[2]), int(ends[3]) + 1)]
        else:
            paths.append(path)
    return ",".join(paths)


def choose_preset(name: str, model: str | None) -> Preset:
    """The preset of a name, for a network; None: for its own.

    Raises:
        InvalidInput: it is unknown, or was published for another network.
    """
    preset = presets()[choose("preset", name, presets())]
    if model not in (None, preset.model):
        raise InvalidInput(
            f"Cannot use preset {name} on {model}: it was published for {preset.model}. Leave the "
            "network out, or choose another of `layerwise list presets`."
        )
    return preset
