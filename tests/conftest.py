"""What a test run left out, said in its last line."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

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


# few examples, the same ones each time; `pytest --hypothesis-profile faults` tries many new ones
settings.register_profile(
    "few",
    max_examples=25,
    derandomize=True,
    deadline=None,  # tests/hostile.py has its own
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "faults", settings.get_profile("few"), max_examples=1000, derandomize=False, print_blob=True
)
settings.load_profile("few")
