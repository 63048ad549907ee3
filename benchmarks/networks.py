"""Networks of torchvision, timm and Hugging Face, each cut in four ways and checked.

python benchmarks/networks.py --csv results/networks.csv --table docs/networks-table.md

A cell is "works" if all checks pass, "refused" with the message, or "wrong" with the reason. If a
refusal names modules to keep whole, the cell is tried again with them. Weights are random, and
images are as small as a network allows. Libraries that are not installed, and cells that are in
the CSV already, are skipped.

python benchmarks/networks.py --losses all --csv results/networks-losses.csv --table losses-table.md

tries local losses instead, by one cut: a few steps of every loss on every network. Here "works"
means that all losses of all units are finite and that the weights of every unit move.
"""

import argparse
import ast
import importlib
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.outputs import main_output
from layerwise.core.side_effects import states_kept
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.losses import Targets
from layerwise.models import create_model
from tables import fill_table, read_table

CUTS: tuple[Any, ...] = ("layer", "block", "module", 4)
CLASSES = 10
COLUMNS = ("library", "network", "side", "cut", "result", "units", "leaves", "reason", "seconds")
MOST_TRIES = 4  # with the modules that refusals name
STEPS, BATCH = 2, 4  # of every loss
LOSS_COLUMNS = ("library", "network", "side", "cut", "loss", "result", "units", "reason", "seconds")

Make = Callable[[], nn.Module]

TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "vgg11": (32, {}),
    "vgg13_bn": (32, {}),
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "resnext50_32x4d": (32, {}),
    "densenet121": (32, {}),
    "squeezenet1_1": (32, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (299, {"init_weights": False}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "mnasnet0_5": (32, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "regnet_x_400mf": (32, {}),
    "regnet_y_400mf": (32, {}),
    "convnext_tiny": (32, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vit_b_16": (32, {"image_size": 32}),
    "maxvit_t": (224, {}),
}
DROP = {"drop_path_rate": 0.1}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet10t": (32, DROP),
    "resnet26d": (32, DROP),
    "resnetv2_50": (32, {}),
    "seresnet18": (32, DROP),
    "ecaresnet26t": (32, DROP),
    "eca_resnet33ts": (32, {}),
    "skresnet18": (32, DROP),
    "resnest14d": (64, {}),
    "res2net50_14w_8s": (32, {}),
    "resnext26ts": (32, DROP),
    "gcresnext26ts": (32, {}),
    "rexnet_100": (32, {}),
    "regnety_002": (32, DROP),
    "nf_regnet_b0": (32, {}),
    "nf_resnet26": (32, {}),
    "dpn48b": (32, {}),
    "dla34": (64, {}),
    "densenet121": (32, {}),
    "ese_vovnet19b_slim": (64, DROP),
    "cspresnet50": (32, DROP),
    "cspdarknet53": (32, {}),
    "darknet17": (32, {}),
    "selecsls42b": (64, {}),
    "hrnet_w18_small": (64, {}),
    "xception41": (64, {}),
    "inception_v4": (96, {}),
    "vgg11_bn": (32, {}),
    "repvgg_a0": (32, {}),
    "mobileone_s0": (32, {}),
    "ghostnet_050": (32, {}),
    "hardcorenas_a": (32, DROP),
    "mobilenetv3_small_050": (32, DROP),
    "mobilenetv4_conv_small_035": (32, DROP),
    "mobilenetv1_100": (32, {}),
    "efficientnet_b0": (32, DROP),
    "efficientnet_lite0": (32, DROP),
    "tf_efficientnetv2_b0": (32, DROP),
    "mixnet_s": (32, DROP),
    "mnasnet_small": (32, {}),
    "fbnetc_100": (32, {}),
    "tinynet_e": (32, {}),
    "lcnet_050": (32, {}),
    "semnasnet_075": (32, {}),
    "convnext_atto": (32, DROP),
    "convnextv2_atto": (32, DROP),
    "convmixer_768_32": (32, {}),
    "inception_next_atto": (64, DROP),
    "mambaout_femto": (64, DROP),
    "poolformer_s12": (64, DROP),
    "caformer_s18": (64, DROP),
    "edgenext_xx_small": (64, DROP),
    "starnet_s050": (32, DROP),
    "rdnet_tiny": (64, {}),
    "focalnet_tiny_srf": (64, DROP),
    "fastvit_t8": (64, DROP),
    "repvit_m0_9": (32, {}),
    "efficientformer_l1": (224, DROP),
    "efficientformerv2_s0": (224, DROP),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "mobilevit_xxs": (64, DROP),
    "mobilevitv2_050": (64, DROP),
    "levit_128s": (224, DROP),
    "vit_tiny_patch16_224": (32, {"img_size": 32, **DROP}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, **DROP}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, **DROP}),
    "hiera_tiny_224": (64, {"img_size": 64, **DROP}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 4, **DROP}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, **DROP}),
    "pvt_v2_b0": (32, DROP),
    "twins_svt_small": (64, {"img_size": 64, **DROP}),
    "crossvit_tiny_240": (240, DROP),
    "tnt_s_patch16_224": (32, {"img_size": 32, "depth": 4, **DROP}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, **DROP}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, **DROP}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64, **DROP}),
    "coatnet_pico_rw_224": (64, {"img_size": 64, **DROP}),
    "davit_tiny": (64, DROP),
    "gcvit_xxtiny": (224, DROP),
    "mvitv2_tiny": (64, {"img_size": 64, **DROP}),
    "nest_tiny": (64, {"img_size": 64, **DROP}),
    "tiny_vit_5m_224": (224, DROP),
    "visformer_tiny": (64, {"img_size": 64, **DROP}),
    "sequencer2d_s": (64, {"img_size": 64, **DROP}),
    "mixer_s32_224": (64, {"img_size": 64, **DROP}),
    "resmlp_12_224": (32, {"img_size": 32, **DROP}),
    "gmixer_24_224": (32, {"img_size": 32, **DROP}),
    "gmlp_ti16_224": (32, {"img_size": 32, **DROP}),
    "halonet26t": (256, {}),
    "lambda_resnet26t": (128, {}),
    "botnet26t_256": (128, {"img_size": 128}),
}
WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
HUGGING_FACE: dict[str, tuple[int, dict[str, Any]]] = {
    "ViT": (32, {**WIDTH, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}),
    "DeiT": (32, {**WIDTH, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}),
    "Beit": (32, {**WIDTH, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}),
    "Dinov2": (32, {**WIDTH, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}),
    "Swin": (32, {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
                  "num_heads": [2, 4], "window_size": 4}),
    "ConvNext": (32, {"hidden_sizes": [16, 32, 64], "depths": [2, 2, 2], "num_stages": 3}),
    "ResNet": (32, {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]}),
    "RegNet": (32, {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128],
                    "depths": [1, 2, 2, 1], "groups_width": 16}),
    "PoolFormer": (64, {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]}),
    "MobileNetV2": (32, {"depth_multiplier": 0.35}),
    "PvtV2": (64, {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 40, 64]}),
    "Segformer": (64, {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]}),
}  # fmt: skip
REGISTRY = {"vgg8b": 32, "resnet18": 32, "resnet32": 32}


def networks() -> Iterable[tuple[str, str, int, Make, str | None]]:
    """Library, name, side of an image in pixels, maker, and where the output holds the logits."""
    for name, side in REGISTRY.items():
        yield (
            "layerwise",
            name,
            side,
            partial(create_model, name, width=0.25, image_size=side),
            None,
        )
    if (models := library("torchvision.models")) is not None:
        for name, (side, options) in TORCHVISION.items():
            make = partial(getattr(models, name), weights=None, num_classes=CLASSES, **options)
            yield "torchvision", name, side, make, None
    if (timm := library("timm")) is not None:
        for name, (side, options) in TIMM.items():
            yield "timm", name, side, partial(timm.create_model, name, num_classes=CLASSES,
                                              **options), None  # fmt: skip
    if (hub := library("transformers")) is not None:
        for name, (side, options) in HUGGING_FACE.items():
            yield "transformers", name, side, partial(hugging_face, hub, name, options), "logits"


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision raises a RuntimeError where its operators do not load
        print(f"left out: {name} ({type(error).__name__})", flush=True)
        return None


def hugging_face(hub: Any, name: str, options: dict[str, Any]) -> nn.Module:
    configuration = getattr(hub, f"{name}Config")(**options, num_labels=CLASSES)
    network: nn.Module = getattr(hub, f"{name}ForImageClassification")(configuration)
    return network


def cell(make: Make, side: int, cut: Any, output: str | None) -> dict[str, Any]:
    """The result of a network under a cut."""
    row = tried(lambda leaves: checked(make, side, cut, output, leaves))
    return {**row, "cut": cut}


def loss_cell(make: Make, side: int, cut: Any, output: str | None, loss: str) -> dict[str, Any]:
    """The result of a network with a loss."""
    row = tried(lambda leaves: stepped(make, side, cut, output, leaves, loss))
    del row["leaves"]
    return {**row, "cut": cut, "loss": loss}


def tried(try_with: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """What a trial gives, with the modules kept whole that its refusals name."""
    begun, leaves = time.process_time(), list[str]()
    row: dict[str, Any] = {"result": "refused"}
    for _ in range(MOST_TRIES):
        try:
            row = try_with(leaves)
        except (CannotSplit, InvalidInput) as refusal:
            row["reason"] = str(refusal)
            wanted = re.search(r"leaves=(\[.*?\])", str(refusal))
            named = ast.literal_eval(wanted[1]) if wanted and "…" not in wanted[1] else []
            if not set(named) - set(leaves):
                break
            leaves += [path for path in named if path not in leaves]
            continue
        except Exception as error:
            row = {"result": "wrong", "reason": f"{type(error).__name__}: {error}"}
        break
    seconds = round(time.process_time() - begun, 1)
    return {**row, "leaves": len(leaves) or "", "seconds": seconds}


def stepped(
    make: Make, side: int, cut: Any, output: str | None, leaves: list[str], loss: str
) -> dict[str, Any]:
    """Localize a network with a loss, and make a few steps.

    Raises:
        CannotSplit, InvalidInput: a refusal.
    """
    torch.manual_seed(0)
    model, images = make(), torch.randn(BATCH, 3, side, side)
    labels = torch.arange(BATCH) % 2  # a contrastive loss needs pairs
    learner = layerwise.localize(
        model, images, CLASSES, loss=loss, at=cut, leaves=leaves, output=output, seed=0, check=False
    )
    before = [[weight.clone() for weight in unit.piece.parameters()] for unit in learner.units]
    losses = [value for _ in range(STEPS) for value in learner.step(images, labels).losses]
    still = [
        unit.name
        for unit, weights in zip(learner.units, before, strict=True)
        if weights and all(map(torch.equal, weights, unit.piece.parameters()))
    ]
    faults = [
        *([] if all(map(math.isfinite, losses)) else ["a loss is not finite"]),
        *([f"no weight moved in {', '.join(still)}"] if still else []),
    ]
    result = "wrong" if faults else "works"
    return {"result": result, "units": len(learner.units), "reason": "; ".join(faults)}


def table_of_losses(rows: list[dict[str, str]]) -> str:
    """A line per network with a column per loss, the counts, and the reasons."""
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    by_network: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        by_network.setdefault((row["library"], row["network"]), {})[row["loss"]] = row
    lines = ["| network | units | " + " | ".join(losses) + " |", "|---" * (len(losses) + 2) + "|"]
    for (source, name), cells in by_network.items():
        units = next((row["units"] for row in cells.values() if row["units"]), "")
        shown = [cells[loss]["result"] if loss in cells else "" for loss in losses]
        lines.append(f"| {source} {name} | {units} | " + " | ".join(shown) + " |")
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("works", "refused",
                                                                            "wrong")}  # fmt: skip
    summary = (
        f"{len(by_network)} networks, {len(rows)} cells: {counts['works']} work, "
        f"{counts['refused']} are refused, {counts['wrong']} are wrong."
    )
    reasons = [
        f"* {row['library']} {row['network']}, {row['loss']}, {row['result']}: {row['reason']}"
        for row in rows
        if row["result"] != "works"
    ]
    return "\n".join([summary, "", *lines, "", *reasons]) + "\n"


def checked(
    make: Make, side: int, cut: Any, output: str | None, leaves: list[str]
) -> dict[str, Any]:
    """Localize a network and check what ``localize`` checks itself, and what it does not.

    Raises:
        CannotSplit, InvalidInput: a refusal.
    """
    torch.manual_seed(0)
    model = make()
    keys, sample = list(model.state_dict()), torch.randn(2, 3, side, side)
    options: dict[str, Any] = {"loss": pooled_loss, "at": cut, "leaves": leaves, "output": output}
    learner = layerwise.localize(
        model, sample, CLASSES, optimizer=partial(torch.optim.SGD, lr=0.01), seed=0, **options
    )
    faults = [
        *other_batch(learner, output, side),
        *crossing_gradients(learner, sample),
        *([] if list(model.state_dict()) == keys else ["keys of the state_dict changed"]),
    ]
    result = "wrong" if faults else "works"
    return {"result": result, "units": len(learner.units), "reason": "; ".join(faults)}


class pooled_loss(nn.Module):
    """A loss for features of any shape: which axis holds channels does not matter here."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor, targets: Targets) -> Any:
        loss = (features * self.scale).square().mean()
        return layerwise.losses.Evaluated(loss, torch.zeros((), dtype=torch.long))


def other_batch(learner: Any, output: str | None, side: int) -> list[str]:
    """Compare the composed units with the network at another batch size, in evaluation mode."""
    images, faults = torch.randn(3, 3, side, side), []
    with torch.no_grad(), states_kept(learner.model):
        learner.train(False)
        expected = main_output(learner.model(images), output)
        activations: tuple[Any, ...] = (images,)
        for unit in learner.units:
            activations = unit.piece(*activations)
            if len(activations[0]) != len(images):
                rows = len(activations[0])
                faults.append(f"the feature of {unit.name} has {rows} rows for 3 images")
        if not torch.allclose(expected, activations[0], rtol=1e-4, atol=1e-5):
            faults.append("another output for 3 images")
    return faults[:2]


def crossing_gradients(learner: Any, sample: Tensor) -> list[str]:
    """Units whose loss reaches weights of another unit, and weights in two units."""
    faults, seen = [], dict[int, str]()
    learner.train()
    model = learner.model
    activations: tuple[Any, ...] = (sample,)
    targets = Targets(torch.arange(len(sample)), CLASSES, sample)
    with states_kept(model):
        for unit in learner.units:
            own = {id(weight) for weight in unit.piece.parameters()}
            if any(key in seen for key in own):
                faults.append(f"a weight of {unit.name} is in another unit too")
            seen |= dict.fromkeys(own, unit.name)
            activations = unit.piece(*activations)
            loss, _ = unit.loss(activations[0], targets)
            others = [weight for weight in model.parameters() if id(weight) not in own]
            gradients = torch.autograd.grad(loss, others, allow_unused=True) if others else ()
            if any(gradient is not None for gradient in gradients):
                faults.append(f"the loss of {unit.name} reaches another unit")
            activations = tuple(
                value.detach() if isinstance(value, Tensor) else value for value in activations
            )
    return faults[:2]


def table(rows: list[dict[str, str]]) -> str:
    """A line per network, and the counts."""
    by_network: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        by_network.setdefault((row["library"], row["network"]), {})[row["cut"]] = row
    cuts = [str(cut) for cut in CUTS]
    lines = ["| network | " + " | ".join(f"`{cut}`" for cut in cuts) + " |", "|---" * 5 + "|"]
    for (source, name), cells in by_network.items():
        shown = [in_words(cells[cut]) if cut in cells else "" for cut in cuts]
        lines.append(f"| {source} {name} | " + " | ".join(shown) + " |")
    whole = sum(
        all(cells.get(cut, {}).get("result") == "works" for cut in cuts)
        for cells in by_network.values()
    )
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("works", "refused",
                                                                            "wrong")}  # fmt: skip
    kept = sum(row["result"] == "works" and bool(row["leaves"]) for row in rows)
    summary = (
        f"{len(by_network)} networks, {len(rows)} cells: {counts['works']} work ({kept} of them "
        f"with the leaves that a refusal named), {counts['refused']} are refused, "
        f"{counts['wrong']} are wrong. {whole} networks work under all cuts."
    )
    reasons = [
        f"* {row['library']} {row['network']}, `{row['cut']}`, {row['result']}: {row['reason']}"
        for row in rows
        if row["result"] != "works"
    ]
    return "\n".join([summary, "", *lines, "", *reasons]) + "\n"


def in_words(row: dict[str, str]) -> str:
    if row["result"] != "works":
        return row["result"]
    return f"{row['units']} units" + (f", {row['leaves']} leaves" if row["leaves"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="names of networks")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no network after these")
    parser.add_argument("--losses", metavar="A,B", help="local losses to try, or all")
    parser.add_argument("--cut", default="block", help="where units end, with --losses")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    losses = list_of_losses(arguments.losses)
    columns = LOSS_COLUMNS if losses else COLUMNS
    tried = "loss" if losses else "cut"
    done = {(row["library"], row["network"], row[tried]) for row in rows_before(arguments, columns)}
    begun = time.monotonic()
    for source, name, side, make, output in networks():
        missing = [each for each in losses or CUTS if (source, name, str(each)) not in done]
        if not missing or (arguments.only and name not in arguments.only):
            continue
        if time.monotonic() - begun > arguments.seconds:
            break
        try:
            make()
        except Exception as error:  # another version of its library
            print(f"left out: {source} {name} ({error})", flush=True)
            continue
        if losses:
            rows = [loss_cell(make, side, arguments.cut, output, loss) for loss in missing]
            words = [f"{row['loss']} {row['result']}" for row in rows]
        else:
            rows = [cell(make, side, cut, output) for cut in missing]
            words = [in_words(row) for row in rows]
        named = [{**row, "library": source, "network": name, "side": side} for row in rows]
        fill_table(arguments.csv, named, ("library", "network", tried), columns)
        print(source, name, *words, flush=True)
    if arguments.table:
        rows_now = read_table(arguments.csv)
        arguments.table.write_text((table_of_losses if losses else table)(rows_now))


def rows_before(arguments: argparse.Namespace, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of the table that is to be filled.

    Raises:
        SystemExit: they are of the other table.
    """
    rows = read_table(arguments.csv)
    if rows and tuple(rows[0]) != tuple(columns):
        sys.exit(
            f"Cannot add to {arguments.csv}: it is a table of another kind. Give another file."
        )
    return rows


def list_of_losses(text: str | None) -> list[str]:
    """Losses by their names, joined by commas; all that are registered, or none."""
    return list(layerwise.LOSSES) if text == "all" else text.split(",") if text else []


if __name__ == "__main__":
    main()
