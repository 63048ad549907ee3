"""``layerwise predict``: the five likeliest classes of images."""

import argparse
import json
from typing import Any

from layerwise.cli.options import Parser, folder_name
from layerwise.errors import InvalidInput
from layerwise.runs.folder import RunFolder


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", type=folder_name, metavar="RUN", help="folder of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--best", action="store_true", help="the best epoch's weights instead of the last's"
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.training.predict import predict

    result = predict(RunFolder(parsed.folder), parsed.images, parsed.best)
    if result["refused"]:
        if parsed.json:
            print(json.dumps(result, allow_nan=False))
        count, total = len(result["refused"]), len(parsed.images)
        if total == 1:
            raise InvalidInput(result["refused"][0]["reason"])
        raise InvalidInput(
            f"Cannot read {count} of {total} images: each is named above. Leave them out, or "
            "replace them."
        )
    return result
