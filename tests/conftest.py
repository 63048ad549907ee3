"""What a test run left out, said in its last line."""

from collections import Counter

import pytest

# a reason that tests are skipped for -> how to have them
REMEDIES = {
    "GPU": "run them on a machine with a GPU",
    "triton": "run them on a machine with a GPU",
    "chromium": "install chromium and chromium-driver",
}


NAMES = {"GPU": "a GPU", "triton": "a GPU", "chromium": "a browser"}


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print how many tests were skipped, why, and how to have them."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    reasons: Counter[str] = Counter()
    for report in reporter.stats.get("skipped", []):
        text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        key = next((word for word in REMEDIES if word.lower() in text.lower()), None)
        reasons[
            f"need {NAMES.get(key, key)}: {REMEDIES[key]}"
            if key
            else text.removeprefix("Skipped: ")
        ] += 1
    left_out = "; ".join(f"{count} ({reason})" for reason, count in reasons.items())
    print(f"Left out: {left_out}." if left_out else "Left out: nothing.")
