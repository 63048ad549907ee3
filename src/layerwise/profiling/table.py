"""The tables that ``layerwise profile`` shows."""

from typing import Any

from rich.table import Table

from layerwise.utils import terminal

DEVICES = {
    "cpu": "a CPU",
    "cuda": "a GPU, for steps made singly, without what cannot be known: workspaces that cuDNN "
    "chooses, remainders of the allocator's blocks, and what cuBLAS holds between steps (32 MiB "
    "for each thread and stream on Hopper)",
}


def print_table(result: dict[str, Any], per_unit: bool) -> None:
    """Print the table: memory in MB (10^6 bytes), time in milliseconds.

    The ratio to global training stands in brackets.
    """
    rules = result["rules"]
    first = next(iter(rules.values()))
    heads = {name: rule["head_parameters"] for name, rule in rules.items()}
    caption = (
        f"{first['parameters']:,} parameters. Memory is counted whole: weights, heads, gradients, "
        f"optimizer state, activations, temporaries; predicted for {DEVICES[result['device']]}, "
        "channels-last unless --memory-format contiguous is given. saved: the most that is kept "
        "for a backward pass at once. sequential: one step of each unit, with the frozen units "
        "before it; its cache is not in the peaks. process: with Python and PyTorch themselves. "
        "(…): ratio to global."
    )
    table = Table(
        title=f"{result['model']}, batch of {result['batch_size']}, {result['image_size']} pixels",
        caption=caption,
    )
    columns = {
        "rule": lambda name, rule: name + parts_in_words(rule),
        "multiply-adds, G": lambda name, rule: ratio(rules, rule, "multiply_adds", 1e9),
        "head parameters": lambda name, rule: f"{heads[name]:,}",
        "saved, MB": lambda name, rule: ratio(rules, rule, "saved_bytes", 1e6),
        "predicted peak, MB": lambda name, rule: ratio(rules, rule, "predicted_peak_bytes", 1e6),
        "measured peak, MB": lambda name, rule: ratio(rules, rule, "peak_bytes", 1e6),
        "process, MB": lambda name, rule: ratio(rules, rule, "process_peak_bytes", 1e6),
        "cache, MB": lambda name, rule: (
            f"{rule['cache_bytes'] / 1e6:,.0f}" if rule["cache_bytes"] else "–"
        ),
        "step, ms": lambda name, rule: ratio(rules, rule, "seconds", 1e-3),
        "images/s": lambda name, rule: (
            "–" if rule["images_per_second"] is None else f"{rule['images_per_second']:,.0f}"
        ),
        "unit of the peak": lambda name, rule: rule["peak_unit"],
    }
    if "largest_batch" in first:
        columns["largest batch"] = lambda name, rule: str(rule["largest_batch"] or "none")
    for heading in columns:
        table.add_column(
            heading, justify="left" if heading in ("rule", "unit of the peak") else "right"
        )
    for name, rule in rules.items():
        table.add_row(*(cell(name, rule) for cell in columns.values()))
    terminal.print_table(table)
    for name, rule in rules.items():
        if per_unit:
            print_units(name, rule)


def parts_in_words(rule: dict[str, Any]) -> str:
    """The number of parts that a batch was found to be computed in; nothing of a whole one."""
    parts = rule.get("micro_batches", 1)
    return f", {parts} parts" if parts > 1 else ""


def ratio(rules: dict[str, Any], rule: dict[str, Any], key: str, scale: float) -> str:
    if rule[key] is None:
        return "–"
    reference = rules.get("global", {}).get(key)
    return f"{rule[key] / scale:,.1f}" + (f" ({rule[key] / reference:.2f})" if reference else "")


def print_units(name: str, rule: dict[str, Any]) -> None:
    table = Table(title=f"units of {name}")
    keys = (
        "multiply_adds",
        "parameters",
        "head_parameters",
        "saved_bytes",
        "predicted_peak_bytes",
        "peak_bytes",
        "seconds",
    )
    for heading in (
        "unit",
        "multiply-adds, G",
        "parameters",
        "head parameters",
        "saved, MB",
        "predicted, MB",
        "measured, MB",
    ):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    table.add_column("step, ms", justify="right")
    scales = (1e9, None, None, 1e6, 1e6, 1e6, 1e-3)
    for unit in rule["units"]:
        values = [unit[key] for key in keys]
        cells = [
            "–" if v is None else f"{v:,}" if s is None else f"{v / s:,.2f}"
            for v, s in zip(values, scales, strict=True)
        ]
        table.add_row(unit["name"], *cells)
    terminal.print_table(table)
