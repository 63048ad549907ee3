"""From runs to the paper's rows, claims and tables.

The runs are made up: their accuracies are what a test needs.
"""

import csv
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from layerwise.cli import parse
from layerwise.cli.values import collect, collect_both
from layerwise.errors import InvalidInput
from layerwise.paper.claims import number
from layerwise.paper.numbers import Setting, measured, place_of, repeated, settings
from layerwise.paper.over_scales import Standing, standings
from layerwise.paper.rows import COLUMNS, DEPARTURES, ROWS, TABLES, Row, match, row_run
from layerwise.paper.statistics import Comparison, Scores, compare
from layerwise.paper.verdicts import (
    CLAIMS,
    INCONSISTENCIES,
    Claim,
    Evidence,
    judge,
    judge_all,
    rank_correlations,
)
from layerwise.report import write_latex
from layerwise.report.page.results import measured_row
from layerwise.report.page.story import headline
from layerwise.report.tables import (
    RUN_COLUMNS,
    claims_csv,
    command,
    escape,
    latex_table,
    runs_csv,
)
from layerwise.runs.folder import FORMATS
from layerwise.runs.records import Record, read_runs
from layerwise.runs.run import Run, described
from layerwise.utils.options import Options

RESULTS = Path(__file__).parents[1] / "results"
PAPER = Setting("paper", "predsim", 400, False)
SMALL = Setting("small", "predsim", 20, True)
R4 = ("resnet18_r4", "resnet18")


def row(table: int, name: str) -> Row:
    return next(row for row in ROWS if (row.table, row.name) == (table, name))


def record(
    row: Row,
    column: str,
    accuracy: float | None,
    seed: int = 0,
    scale: str = "paper",
    curve=(),
    **changes,
) -> Record:
    """A run that gives a row's number; without an accuracy one that is not finished."""
    run = row_run(row, scale, column, seed, **changes)
    epochs = tuple(
        {"epoch": epoch, "epochs": run.epochs, "test_accuracy": value} for epoch, value in curve
    )
    result = None if accuracy is None else {"test_accuracy": accuracy}
    return Record(f"runs/{row.name}-{column}-{seed}", run, {"data": {}}, epochs, result, ())


def seeded(row: Row, column: str, *accuracies: float, **options) -> list[Record]:
    return [
        record(row, column, accuracy, seed, **options) for seed, accuracy in enumerate(accuracies)
    ]


@cache
def as_printed() -> list[Record]:
    """The paper's own numbers, with three seeds that hardly differ; ResNet18 on CIFAR-100 has those
    of Table VI.
    """
    shared = INCONSISTENCIES[0].rows[0]
    return [
        run
        for row in ROWS
        if row != shared
        for column in COLUMNS
        for run in seeded(
            row, column, *(row.accuracy(column) + shift for shift in (-0.001, 0.0, 0.001))
        )
    ]


def claim(key: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.key == key)


def folder(path, run: Run, accuracy: float, **facts) -> None:
    """A finished run of one epoch as it lies on disk."""
    path.mkdir(parents=True)
    scores = {"epoch": 1, "epochs": run.epochs, "val_accuracy": None, "test_accuracy": accuracy}
    numbers = {
        "seconds": 12.5,
        "images_per_second": 800.0,
        "peak_memory_bytes": 30_000_000,
        "parameters": 701_466,
    }
    machine = {"device": "A CPU, of 2 cores", "torch": "2.9.0", "cpu_threads": 2}
    known = {
        "format": FORMATS[-1],
        "run": described(run),
        "data": {},
        "machine": machine,
        "commit": "0123456789ab",
        **facts,
    }
    (path / "run.json").write_text(json.dumps(known))
    (path / "log.jsonl").write_text(json.dumps({**scores, "units": [{"index": 0}]}) + "\n")
    (path / "result.json").write_text(
        json.dumps({**scores, **numbers, "hierarchy": [1, 1], "run": str(path)})
    )


def test_a_setting_says_all_that_may_differ_between_runs_of_a_scale():
    assert set(DEPARTURES) == {"loss", "epochs", "amp"}  # a new one must become a field of Setting


def test_mean_and_deviation_are_over_seeds():
    base = row(5, "resnet18")
    runs = [
        record(base, "layerwise", accuracy, seed)
        for seed, accuracy in ((2, 80.0), (0, 84.0), (1, 82.0))
    ]
    found = measured(runs, base, "layerwise", PAPER)
    assert (found.mean, found.deviation, found.seeds) == (82.0, 2.0, (0, 1, 2))
    assert found.accuracies == (84.0, 82.0, 80.0)
    assert measured(runs, base, "global", PAPER) is None
    assert measured(runs[:1], base, "layerwise", PAPER).deviation is None


def test_numbers_of_different_scales_losses_and_schedules_never_mix():
    base = row(5, "resnet18")
    runs = [
        record(base, "layerwise", 80.0),
        record(base, "layerwise", 70.0, seed=1, epochs=100),
        record(base, "layerwise", 60.0, seed=2, loss="pred"),
        record(base, "layerwise", 50.0, seed=3, amp=True),
        record(base, "layerwise", 40.0, seed=4, scale="small"),
        record(base, "layerwise", None, seed=5),
    ]
    found = {setting: measured(runs, base, "layerwise", setting) for setting in settings(runs)}
    assert [(setting.key, number.mean, number.seeds) for setting, number in found.items()] == [
        ("paper", 80.0, (0,)),
        ("paper-bfloat16", 50.0, (3,)),
        ("paper-100-epochs", 70.0, (1,)),
        ("paper-pred", 60.0, (2,)),
        ("small", 40.0, (4,)),
    ]
    assert [setting.title for setting in found] == [
        "paper scale",
        "paper scale: bfloat16 instead of float32",
        "paper scale: 100 epochs instead of 400, decays in proportion",
        "paper scale: pred instead of predsim",
        "small scale",
    ]
    assert all(setting.departures == number.departures for setting, number in found.items())


def test_global_runs_belong_to_the_setting_of_every_loss_with_their_schedule():
    base = row(5, "resnet18")
    runs = [
        record(base, "global", 90.0, scale="small"),
        record(base, "layerwise", 50.0, scale="small", loss="pred"),
        record(base, "global", 95.0, epochs=100),
    ]
    alone, beside = settings(runs)
    assert (alone.key, beside.key) == ("paper-100-epochs", "small-pred")
    assert measured(runs, base, "global", beside).mean == 90.0
    assert measured(runs, base, "global", alone).mean == 95.0
    assert measured(runs, base, "layerwise", alone) is None


def test_rows_shared_by_tables_share_their_runs_and_a_seed_trained_twice_counts_once():
    runs = [
        record(row(3, "resnet18"), "layerwise", 80.0),
        record(row(5, "resnet18"), "layerwise", 10.0),
    ]
    for table in (3, 5):
        found = measured(runs, row(table, "resnet18"), "layerwise", PAPER)
        assert (found.mean, found.seeds) == (80.0, (0,))


def test_an_unknown_column_is_refused():
    with pytest.raises(InvalidInput, match="Accepted: layerwise, global"):
        measured([], ROWS[0], "local", PAPER)


def test_the_papers_own_numbers_give_its_own_order():
    for table in TABLES:
        for column in COLUMNS:
            (found,) = rank_correlations(as_printed(), table, PAPER, column)
            assert len(found.rows) == sum(row.table == table for row in ROWS)
            if (table, column) != (4, "layerwise"):  # where ResNet18 has the number of Table VI
                assert found.spearman == pytest.approx(1.0)
    (found,) = rank_correlations(as_printed(), 4, PAPER, "layerwise")
    assert found.spearman == pytest.approx(29 / 35)  # one row moved by two ranks


def test_rank_correlation_needs_three_rows_and_follows_the_order_not_the_values():
    rows = [row(5, name) for name in ("resnet18_r4", "resnet18", "resnet18_r2")]
    runs = [
        record(entry, "layerwise", value, scale="small")
        for entry, value in zip(rows, (20.0, 30.0, 99.0), strict=True)
    ]
    (found,) = rank_correlations(runs, 5, SMALL)
    assert found.spearman == pytest.approx(-1.0)
    assert found.rows == ("resnet18", "resnet18_r2", "resnet18_r4")
    assert rank_correlations(runs[:2], 5, SMALL)[0].spearman is None
    assert rank_correlations(runs, 5, PAPER) == []
    with pytest.raises(InvalidInput, match="no table 7"):
        rank_correlations(runs, 7, SMALL)


def test_networks_of_another_width_are_ranked_apart():
    names = ("resnet18", "resnet18_r1", "resnet18_r4", "resnet50", "resnet50_r1", "resnet50_r4")
    runs = [
        record(row(5, name), "layerwise", value, scale="small")
        for name, value in zip(names, (3.0, 2.0, 1.0, 11.0, 12.0, 13.0), strict=True)
    ]
    found = rank_correlations(runs, 5, SMALL)
    assert [(each.width, len(each.rows)) for each in found] == [(0.25, 3), (0.125, 3)]
    assert [each.spearman for each in found] == [pytest.approx(-1.0), pytest.approx(1.0)]


def test_the_papers_own_numbers_give_the_verdicts_that_its_tables_imply():
    verdicts = {verdict.claim.key: verdict for verdict in judge_all(as_printed(), PAPER)}
    against = {key for key, verdict in verdicts.items() if verdict.verdict == "does not hold"}
    unknown = {key for key, verdict in verdicts.items() if verdict.verdict == "not measured"}
    assert against == {
        "depth-impairs",
        "gap-grows",
        "vgg19-vgg16",
        "deeper-vgg8b",
        "more-sensitive",  # VGG8b on CIFAR-100
    }
    assert unknown == {
        "ahead-cifar10",
        "ahead-cifar100",
        "sharper-drop",
        "separable-deeper",
        "reason",
    }  # curves, probes, reasons
    assert all(
        verdict.verdict == "holds"
        for key, verdict in verdicts.items()
        if key not in against | unknown
    )
    assert verdicts["resnet50-r4"].effect == pytest.approx(4.21)
    assert verdicts["vgg19-vgg16"].effect == pytest.approx(-0.39)
    assert verdicts["r5-base"].effect == pytest.approx(3.07)


def test_where_the_papers_tables_disagree_with_its_sentences():
    contradicted = {claim.key for claim in CLAIMS if claim.paper_agrees is False}
    assert contradicted == {
        "depth-impairs",  # VGG11 is better than VGG8
        "gap-grows",  # ResNet50's is smaller than ResNet18's
        "vgg11-vgg8",  # by 2.5 and by 0.02 points on CIFAR-100, not around 1
        "vgg19-vgg16",
        "vgg19-vgg16-e1",  # names the two the wrong way round
        "deeper-vgg8b",
        "deeper-resnet18",  # by Table IV's ResNet18
        "more-sensitive",  # by Table IV's ResNet18, and VGG8b on CIFAR-100
        "r5-base",  # 3 points within Table VI, not nearly 7
        "vgg19-e1-vgg16-e2",  # by 2.53 points on CIFAR-100
        "resnet50-cifar100",  # by 2.52 points
    }
    assert {claim.key for claim in CLAIMS if claim.paper_agrees is None} == {
        "ahead-cifar10",
        "ahead-cifar100",
        "sharper-drop",
        "separable-deeper",
        "reason",
    }


def test_the_inconsistencies_are_all_rows_that_one_run_gives_two_numbers_for():
    twice = [
        (one, other)
        for one, other in combinations(ROWS, 2)
        if row_run(one, "paper", "layerwise") == row_run(other, "paper", "layerwise")
        and any(one.accuracy(column) != other.accuracy(column) for column in COLUMNS)
    ]
    assert twice == [inconsistency.rows for inconsistency in INCONSISTENCIES]


def test_claims_compare_within_a_data_set_and_at_the_depth_they_name():
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    for entry in (comparison for claim in CLAIMS for comparison in claim.comparisons):
        assert entry.above.row.data == entry.below.row.data
    for key in ("resnet50-r4", "r5-base"):  # "the same number of convolution layers"
        (entry,) = claim(key).comparisons
        assert sum(entry.above.row.hierarchy) == sum(entry.below.row.hierarchy)
    for entry in claim("fewer-shallow").comparisons:
        above, below = entry.above.row.hierarchy, entry.below.row.hierarchy
        assert above[2:] == below[2:]
        assert sum(above[:2]) < sum(below[:2])


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        # 3.1 points whatever the seed, which itself makes 8
        ((52.0, 56.2, 60.1), (49.0, 53.0, 57.0), "holds"),
        ((49.0, 53.0, 57.0), (52.0, 56.2, 60.1), "does not hold"),
        ((52.0, 53.0, 57.0), (49.0, 53.0, 57.0), "undecided"),  # 1 ± 1
        ((52.0,), (50.0,), "undecided"),  # nothing says how far two runs scatter
        # one row with several seeds does not say it either
        ((56.0,), (49.0, 50.0, 51.0), "undecided"),
        ((), (49.0, 50.0, 51.0), "not measured"),
    ],
)
def test_seeds_decide(better, worse, expected):
    runs = seeded(row(5, "resnet18_r3"), "layerwise", *better) + seeded(
        row(5, "resnet18_r2"), "layerwise", *worse
    )
    verdict = judge(claim("r3-r2"), runs, PAPER)
    assert verdict.verdict == expected
    assert verdict.claim.paper_agrees
    if expected != "not measured":
        assert verdict.effect == pytest.approx(fmean(better) - fmean(worse[: len(better)]))
        assert expected in verdict.detail[0]


def test_of_two_rows_the_test_is_that_of_pairs():
    from scipy.stats import ttest_rel

    # the last seed has no partner
    better, worse = (52.1, 53.4, 51.2, 55.0), (49.0, 50.7, 48.9, 54.1, 99.0)
    runs = seeded(row(5, "resnet18_r3"), "layerwise", *better) + seeded(
        row(5, "resnet18_r2"), "layerwise", *worse
    )
    (outcome,) = judge(
        claim("r3-r2"), [run for run in runs if run.test_accuracy != 99.0], PAPER
    ).outcomes
    test = ttest_rel(better, worse[:4])
    assert outcome.difference / outcome.error == pytest.approx(test.statistic)
    assert outcome.chance == pytest.approx(test.pvalue)
    assert outcome.seeds == 4
    (other,) = judge(claim("r3-r2"), runs, PAPER).outcomes
    assert (other.difference, other.seeds) == (pytest.approx(outcome.difference), 4)


def test_the_scatter_is_of_all_rows_once_row_and_seed_are_accounted_for():
    values = {
        "resnet18": (50.0, 53.0, 51.0),
        "resnet18_r3": (52.0, 55.5, 53.2),
        "resnet18_r2": (49.0, 51.0, 50.7),
    }
    runs = [
        run
        for name, numbers in values.items()
        for run in seeded(row(5, name), "layerwise", *numbers)
    ]
    (outcome,) = judge(claim("r3-r2"), runs, PAPER).outcomes
    table = list(values.values())
    overall = fmean(fmean(line) for line in table)
    squares = sum(
        (table[i][j] - fmean(table[i]) - fmean(line[j] for line in table) + overall) ** 2
        for i in range(3)
        for j in range(3)
    )
    # two-way analysis of variance, 4 degrees of freedom
    assert outcome.error == pytest.approx((2 * squares / 4 / 3) ** 0.5)
    # a row with one seed adds nothing, and takes nothing away
    seed = seeded(row(5, "resnet18_r4"), "layerwise", 80.0)
    assert judge(claim("r3-r2"), runs + seed, PAPER).outcomes[0].error == pytest.approx(
        outcome.error
    )


def test_a_single_seed_gets_the_scatter_of_other_rows_of_its_setting_data_and_column_and_says_so():
    pair = [
        record(row(5, "resnet18_r3"), "layerwise", 53.0),
        record(row(5, "resnet18_r2"), "layerwise", 50.0),
    ]
    assert judge(claim("r3-r2"), pair, PAPER).verdict == "undecided"

    def steady(table: int, column: str = "layerwise", **options) -> list[Record]:
        return [
            run
            for name, numbers in (("vgg11", (70.0, 71.0, 72.0)), ("vgg8", (60.1, 60.9, 62.2)))
            for run in seeded(row(table, name), column, *numbers, **options)
        ]

    found = judge(claim("r3-r2"), pair + steady(1), PAPER)
    assert found.verdict == "holds"
    assert "1 seed; deviation of 2 other rows" in found.detail[0]
    for elsewhere in (steady(2), steady(1, "global"), steady(1, epochs=9)):
        assert judge(claim("r3-r2"), pair + elsewhere, PAPER).verdict == "undecided"


def test_without_a_seed_in_common_nothing_is_decided():
    runs = [record(row(5, "resnet18_r3"), "layerwise", 70.0 + seed / 10, seed) for seed in (0, 1)]
    runs += [record(row(5, "resnet18_r2"), "layerwise", 50.0 - seed / 10, seed) for seed in (2, 3)]
    found = judge(claim("r3-r2"), runs, PAPER)
    assert (found.verdict, found.effect, found.deviation, found.seeds) == (
        "undecided",
        pytest.approx(20.3),
        None,
        2,
    )
    assert "no seed in common" in found.detail[0]


def test_a_claim_does_not_fall_by_the_chance_that_many_comparisons_have():
    families = [
        row(table, name)
        for table in (1, 2)
        for name in ("vgg16", "vgg16_e1", "vgg16_e2", "vgg16_e3")
    ]
    noise = ((0.0, 0.3, -0.2), (0.1, -0.1, 0.3), (-0.2, 0.0, 0.1), (0.2, 0.1, -0.3))

    def runs(step: float) -> list[Record]:
        """Every variation 5 points below the one before, but the last a step above."""
        found = []
        for place, entry in enumerate(families):
            mean = {0: 80.0, 1: 75.0, 2: 70.0, 3: 70.0 + step}[place % 4]
            found += seeded(entry, "layerwise", *(mean + shift for shift in noise[place % 4]))
        return found

    slight, clear = (judge(claim("deeper-vgg"), runs(step), PAPER) for step in (0.65, 5.0))
    # each of the two alone
    assert [outcome.verdict for outcome in slight.outcomes].count("does not hold") == 2
    assert slight.verdict == "undecided"  # of six
    assert clear.verdict == "does not hold"


def test_a_gap_is_global_minus_layerwise_seed_by_seed():
    numbers = {
        "resnet18": ((80.0, 81.0, 82.0), (90.0, 91.0, 92.0)),
        "resnet50_r4": ((85.0, 86.0, 87.0), (86.0, 88.0, 90.0)),
    }
    runs = [
        run
        for name, sides in numbers.items()
        for column, accuracies in zip(COLUMNS, sides, strict=True)
        for run in seeded(row(5, name), column, *accuracies)
    ]
    outcome = compare(
        Comparison(number(5, "resnet18", "gap"), number(5, "resnet50_r4", "gap")),
        Scores(runs, PAPER),
    )
    # of 9, 8 and 7
    assert (outcome.difference, outcome.error) == (pytest.approx(8.0), pytest.approx(3**-0.5))
    assert outcome.verdict == "holds"
    assert outcome.comparison.printed == pytest.approx(92.45 - 86.94 - 90.49 + 89.81)


def test_a_claim_falls_with_one_comparison_and_says_how_many_are_measured():
    runs = seeded(row(3, "resnet50"), "layerwise", 80.0, 80.1) + seeded(
        row(3, "resnet50_e1"), "layerwise", 70.0, 70.1
    )
    partly = judge(claim("deeper-resnet50"), runs, PAPER)
    assert (partly.verdict, partly.measured) == ("holds", 1)
    assert partly.note == "1 of 4 comparisons are measured."
    runs += seeded(row(3, "resnet50_e2"), "layerwise", 90.0, 90.1)
    whole = judge(claim("deeper-resnet50"), runs, PAPER)
    assert (whole.verdict, whole.effect, whole.measured) == (
        "does not hold",
        pytest.approx(-20.0),
        2,
    )


def test_curves_are_compared_at_a_quarter_and_where_the_lead_is_least():
    def curves(shift: float, *names: str) -> list[Record]:
        base = {1: 20.0, 5: 40.0, 10: 60.0, 20: 80.0}
        return [
            record(
                row(5, name),
                "layerwise",
                80.0,
                seed,
                "small",
                [(at, score + lead(at, shift) + seed / 10) for at, score in base.items()],
            )
            for name in names
            for seed in (0, 1)
        ]

    def lead(epoch: int, shift: float) -> float:
        return shift / 5 if epoch == 20 else shift

    runs = curves(0.0, "resnet18", "resnet50") + curves(10.0, "resnet18_r4", "resnet50_r4")
    drop, ahead = (
        judge(claim("sharper-drop"), runs, SMALL),
        judge(claim("ahead-cifar10"), runs, SMALL),
    )
    assert (drop.verdict, drop.effect) == ("holds", pytest.approx(10.0))  # at epoch 5 of 20
    assert (ahead.verdict, ahead.effect) == ("holds", pytest.approx(2.0))
    assert "at epoch 20, where it leads least; ahead at 4 of 4 epochs" in ahead.detail[0]
    rarely = [  # both sides were evaluated at epoch 1, and in the first quarter at no later one
        replace(run, epochs=tuple(entry for entry in run.epochs if entry["epoch"] != 5))
        for run in runs[4:]
    ]
    [first, *_] = judge(claim("sharper-drop"), runs[:4] + rarely, SMALL).detail
    assert "+10.00 points" in first
    assert "at epoch 1:" in first
    lost = replace(record(row(5, "resnet18"), "layerwise", 80.0, 2, "small"), epochs=())
    without_a_log = judge(claim("sharper-drop"), [*runs, lost], SMALL)
    assert (without_a_log.verdict, without_a_log.effect) == (drop.verdict, drop.effect)
    late = [
        replace(
            run,
            epochs=tuple(
                {**entry, "test_accuracy": 0.0} if entry["epoch"] == 1 else entry
                for entry in run.epochs
            ),
        )
        for run in runs[4:]
    ]
    assert judge(claim("ahead-cifar10"), runs[:4] + late, SMALL).verdict == "does not hold"
    assert judge(claim("sharper-drop"), runs[:4] + late, SMALL).verdict == "holds"


def test_differences_on_the_page_are_over_the_seeds_that_both_numbers_have():
    base, moved = row(5, "resnet18"), row(5, "resnet18_r4")
    runs = [  # later seeds are better, whatever is trained
        *seeded(base, "layerwise", 50.0, 60.0, scale="small"),
        *seeded(base, "global", 70.0, scale="small"),
        *seeded(moved, "layerwise", 52.0, scale="small"),
    ]
    evidence = Evidence(runs, ())
    shown = headline(evidence)["table"].rows
    [line] = [cells for cells in shown if cells[1].startswith("measured")]
    assert "1 seed" in line[1]
    assert [cell.value for cell in line[2:]] == [55.0, 52.0, 2.0, 20.0, None]
    table_row = measured_row(evidence, evidence.settings[0], base)
    assert [cell.value for cell in table_row[5:8]] == [55.0, 70.0, 20.0]


def test_probes_are_compared_within_a_run(tmp_path):
    def probed(run: Record, number: int, epoch: int, *accuracies: float) -> Record:
        places = [-1, *range(len(accuracies) - 1)]
        units = [
            {"index": place, "resolution": [8, 8], "linear_probe": accuracy}
            for place, accuracy in zip(places, accuracies, strict=True)
        ]
        units.append({"index": places[-1] + 1, "resolution": None, "linear_probe": 99.0})
        path = tmp_path / str(number)
        path.mkdir(exist_ok=True)
        (path / "separability.jsonl").write_text(
            json.dumps({"epoch": epoch, "units": units}) + "\n"
        )
        return replace(run, path=str(path))

    runs = [
        run
        for name in ("resnet18", "resnet50")
        for run in seeded(row(3, name), "layerwise", 45.0, 45.0)
    ]
    measured = [probed(run, each, 400, 1.0, 40.0, 80.0, 45.0) for each, run in enumerate(runs)]
    found = judge(claim("separable-deeper"), measured, PAPER)
    assert (found.verdict, found.effect, found.measured) == ("holds", 5.0, 2)
    bad: Any = ("abc", "abc")
    for epoch, accuracies in (
        (399, (1.0, 40.0, 45.0)),  # not the last
        (400, (1.0,)),  # no layer
        (400, (1.0, float("nan"), float("nan"))),
        (400, (1.0, *bad)),
    ):
        odd = [probed(run, each, epoch, *accuracies) for each, run in enumerate(runs)]
        assert judge(claim("separable-deeper"), odd, PAPER).verdict == "not measured"
    assert judge(claim("separable-deeper"), runs, PAPER).verdict == "not measured"


def test_global_runs_in_parts_of_batches_are_no_number():
    whole = row_run(row(3, "resnet18"), "small", "global")
    parts = replace(whole, rule_options=Options(micro_batches=8))
    assert match(whole)
    assert match(replace(whole, rule="checkpointed", rule_options=Options(segments=3)))
    assert not match(parts)
    run = record(row(3, "resnet18"), "global", 50.0, scale="small")
    for options, counts in (
        ({"replicas": 1}, True),
        ({"replicas": None}, True),
        ({"replicas": 2, "sync_batch_norm": True, "gather_examples": True}, True),
        ({"replicas": 2, "sync_batch_norm": False, "gather_examples": True}, False),
        ({"replicas": 2, "sync_batch_norm": True, "gather_examples": False}, True),
    ):
        other = replace(run, facts={"execution": options})
        assert bool(measured([other], row(3, "resnet18"), "global", SMALL)) == counts
        assert bool(place_of(other)) == counts == bool(settings([other]))
        assert len(repeated([other, run])) == counts
    local = record(row(3, "resnet18"), "layerwise", 50.0, scale="small")
    shared = {"replicas": 2, "sync_batch_norm": True, "gather_examples": False}
    assert place_of(local)
    assert not place_of(replace(local, facts={"execution": shared}))


def commands_of_results() -> list[tuple[str, str]]:
    return [
        (path.name, line["command"])
        for path in sorted(RESULTS.glob("*.csv"))
        for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        if line.get("command", "").startswith("layerwise train")
    ]


def test_commands_in_results_are_accepted():
    """Each has an effect by all of its options, so nobody is refused who trains a run again."""
    commands = commands_of_results()
    assert len(commands) > 100
    for name, words in commands:
        parsed = parse(shlex.split(words)[1:])
        run, _ = collect_both(parsed)
        assert run.model == shlex.split(words)[2], name


def test_the_command_of_a_run_trains_that_run():
    runs = [
        Run(),
        row_run(row(5, "resnet18_r4"), "small", "layerwise", seed=3, loss="pred"),
        Run(
            flip=False,
            augment=False,
            decay_milestones="",
            at="block",
            lr=1e-5,
            clip_grad=1.0,
            views=4,
            rule="sequential",
            rule_options=Options({"cache": True}),
        ),
        Run(loss_options=Options({"beta": 0.5, "decoder_dim": 64}), output_layer="separate"),
    ]
    for run in runs:
        program, *words = shlex.split(command(run))
        assert program == "layerwise"
        assert collect(parse(words), Run()) == run
    # what a configuration file may say, and has no effect
    idle = {"loss": "pred", "head_lr_factor": 2.0, "at": "block", "train_from": "1"}
    for name, value in idle.items():
        words = shlex.split(command(Run(rule="global", **{name: value})))
        assert collect_both(parse(words[1:]))[0] == Run(rule="global")
    assert command(Run(data="/home/me/my cats")) == "layerwise train resnet18 --data 'my cats'"


@pytest.mark.parametrize("name", ["small-scale", "middle-scale", "full-width"])
def test_commands_in_results_train_runs_of_their_rows(name):
    """What a command leaves out is a default, and defaults change."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as lines:
        unseeded = [line for line in csv.DictReader(lines) if line["seed"] == "0"]
    for line in unseeded:
        place = match(collect(parse(shlex.split(line["command"])[1:]), Run()))
        labels = "; ".join(row.label for row in place.rows)
        assert (place.scale, labels) == (line["scale"], line["rows"]), line["command"]


def test_csv_has_a_line_per_finished_run_and_reads_back(tmp_path):
    small, shared = row(5, "resnet18_r4"), INCONSISTENCIES[0].rows[1]
    folder(tmp_path / "a", row_run(small, "small", "layerwise", seed=2, loss="pred"), 51.5)
    folder(tmp_path / "b", row_run(shared, "paper", "global"), 73.0)
    folder(tmp_path / "c", Run(data="/home/me/cats, dogs"), 60.0, machine="<none>", commit=None)
    folder(tmp_path / "d", Run(), 60.0)
    (tmp_path / "d" / "result.json").unlink()
    records, _ = read_runs([tmp_path])
    text = runs_csv(records)
    one, two, other = csv.DictReader(text.splitlines())
    assert tuple(one) == RUN_COLUMNS
    assert (one["rows"], one["scale"], one["departures"]) == (
        "V resnet18_r4",
        "small",
        "pred instead of predsim",
    )
    assert (float(one["test_accuracy"]), one["paper_accuracy"], one["seed"], one["loss"]) == (
        51.5,
        "89.77",
        "2",
        "pred",
    )
    assert (one["machine"], one["commit"]) == (
        "A CPU, of 2 cores, 2 threads, torch 2.9.0",
        "0123456789ab",
    )
    assert (one["hierarchy"], one["parameters"], one["peak_memory_bytes"]) == (
        "[1,1,2,2]",
        "701466",
        "30000000",
    )
    assert (two["rows"], two["paper_accuracy"], two["loss"]) == (
        "IV resnet18; VI resnet18",
        "72.45; 73.13",
        "cross-entropy",
    )
    assert (other["rows"], other["data"], other["machine"], other["hierarchy"]) == (
        "",
        "cats, dogs",
        "",
        "[1,1]",
    )
    assert "/home" not in text
    assert str(tmp_path) not in text


def test_claims_as_csv_keep_settings_apart():
    runs = as_printed() + seeded(row(5, "resnet18_r3"), "layerwise", 40.0, scale="small")
    lines = list(csv.DictReader(claims_csv(runs).splitlines()))
    assert len(lines) == 2 * len(CLAIMS)
    verdicts = {(line["setting"], line["claim"]): line["verdict"] for line in lines}
    assert verdicts["paper scale", "r3-r2"] == "holds"
    assert verdicts["small scale", "r3-r2"] == "not measured"
    assert {line["sentence"] for line in lines} == {claim.sentence for claim in CLAIMS}


def test_latex_shows_the_paper_beside_one_setting():
    runs = seeded(row(5, "resnet18_r4"), "layerwise", 50.0, 51.0, 52.0, scale="small")
    runs += seeded(row(5, "resnet18_r4"), "global", 60.0, scale="small") + seeded(
        row(5, "resnet18_r4"), "global", 99.0
    )
    text = latex_table(runs, 5, SMALL)
    assert r"resnet18\_r4 & [1,1,2,2] & 89.77 & 93.01 & 51.00 $\pm$ 1.00 & 60.00 & 3/1 \\" in text
    assert r"resnet50 & [3,4,6,3] & 85.60 & 89.65 & -- & -- & 0 \\" in text
    assert "99.00" not in text
    assert (
        text.count("&") == 11 * 6 + 4
    )  # ten rows, the columns' headings, and the headings above them
    assert latex_table(runs, 1, SMALL) is None


def test_latex_escapes_what_it_would_read_as_commands():
    assert escape(r"50% of a_b & {c} #1 $2 \x ~ ^ ±") == (
        r"50\% of a\_b \& \{c\} \#1 \$2 "
        r"\textbackslash{}x \textasciitilde{} \textasciicircum{} $\pm$"
    )


def test_tables_are_written_for_the_settings_that_have_numbers(tmp_path):
    runs = seeded(row(3, "resnet18"), "layerwise", 50.0, scale="small") + seeded(
        row(1, "vgg8"), "layerwise", 9.0, loss="pred"
    )
    folder = tmp_path / "new"
    written = {path.name for path in write_latex(Evidence(runs, ()), str(folder))}
    assert written == {"table-1-paper-pred.tex", "table-3-small.tex", "table-5-small.tex"}
    assert written == {path.name for path in folder.iterdir()}


def test_global_runs_alone_make_no_table_of_a_local_loss(tmp_path):
    runs = seeded(row(5, "resnet18"), "layerwise", 50.0, scale="small", loss="pred")
    runs += seeded(row(1, "vgg8"), "global", 60.0, scale="small")
    written = {path.name for path in write_latex(Evidence(runs, ()), str(tmp_path))}
    assert "table-5-small-pred.tex" in written
    assert "table-1-small-pred.tex" not in written


def test_none_of_it_imports_torch():
    code = (
        "import sys, layerwise.report.tables, layerwise.paper.claims; "
        "print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_networks_of_different_widths_are_not_compared():
    rows = row(5, "resnet18"), row(5, "resnet18_r4"), row(5, "resnet50")
    runs = [run for one in rows for run in seeded(one, "layerwise", 50.0, 51.0, scale="small")]
    wide, narrow = (
        compare(Comparison(number(5, other.name), number(5, "resnet18")), Scores(runs, SMALL))
        for other in rows[1:]
    )
    assert narrow.verdict == "not measured"
    assert "not measured; the widths are 0.125 and 0.25; paper" in narrow.line
    assert wide.verdict == "undecided"
    assert "widths" not in wide.line


def test_global_numbers_alone_say_nothing_of_a_local_loss():
    runs = [
        run
        for name in ("vgg8", "vgg11")
        for run in seeded(row(1, name), "global", 60.0, 61.0, scale="small")
    ]
    runs += seeded(row(1, "vgg8"), "layerwise", 50.0, 51.0, scale="small", loss="pred")
    assert judge(claim("vgg11-vgg8"), runs, replace(SMALL, loss="pred")).verdict == "not measured"
    assert judge(claim("vgg11-vgg8"), runs, SMALL).measured == 1


def of_scale(scale: str, accelerated: float, base: float, **changes) -> list[Record]:
    """ResNet18_r4 and ResNet18 with three seeds that differ by 0.1 points, at a scale."""
    return [
        run
        for name, accuracy in (("resnet18_r4", accelerated), ("resnet18", base))
        for run in seeded(
            row(5, name),
            "layerwise",
            *(accuracy + 0.1 * step for step in (0, 1, 2 if name == "resnet18" else 1)),
            scale=scale,
            **changes,
        )
    ]


def over_scales(runs: list[Record], key: str) -> Standing:
    return next(item for item in standings(Evidence(runs, ())) if item.claim.key == key)


@pytest.mark.parametrize(
    ("middle", "small", "trend"),
    [
        ((73.0, 70.0), (52.0, 51.0), "nearer to the paper"),  # whose difference is 2.83
        ((70.0, 75.0), (53.0, 50.0), "farther from the paper"),
        ((72.0, 70.0), (52.0, 50.0), "no clear change"),
    ],
)
def test_a_claim_over_scales_rests_on_the_largest_that_decides_it(middle, small, trend):
    standing = over_scales(of_scale("small", *small) + of_scale("middle", *middle), "acceleration")
    assert [setting.scale for setting in standing.verdicts] == ["middle", "small"]
    assert standing.rests_on.scale == "middle"
    assert (standing.shared, standing.paper) == (1, pytest.approx(2.83))
    assert [round(point.difference, 1) for point in standing.points.values()] == pytest.approx(
        [round(pair[0] - pair[1] - 0.1 / 3, 1) for pair in (middle, small)]
    )
    assert standing.trend == trend
    assert standing.disagree == (middle[0] < middle[1])


def test_a_scale_that_is_departed_from_or_decides_nothing_goes_behind():
    short = of_scale("paper", 60.0, 50.0, epochs=20)
    undecided = [record(row(5, name), "layerwise", 70.0, scale="middle") for name in R4]
    runs = short + undecided + of_scale("small", 53.0, 50.0)
    standing = over_scales(runs, "acceleration")
    assert [setting.scale for setting in standing.verdicts] == ["middle", "small", "paper"]
    assert (standing.rests_on.scale, standing.verdict) == ("small", "holds")
    assert standing.trend == ""  # one seed has no error to judge a change by


def test_a_setting_that_departs_from_its_scale_says_nothing_of_a_change_with_scale():
    short = of_scale("paper", 60.0, 50.0, epochs=20)
    assert over_scales(short + of_scale("small", 53.0, 50.0), "acceleration").trend == ""
    both = of_scale("middle", 73.0, 70.0) + of_scale("small", 52.0, 51.0)
    standing = over_scales(short + both, "acceleration")
    assert len(standing.points) == 3
    assert standing.trend == "nearer to the paper"


def test_within_one_row_seeds_scatter_too():
    """A difference of two rows cancels what a seed makes of both; a number of one row has it."""
    gaps = {"resnet18": (1.0, 5.0, 9.0), "resnet18_r3": (1.1, 5.0, 8.9)}
    runs = [
        run
        for name, numbers in gaps.items()
        for column, values in (("layerwise", (50.0,) * 3), ("global", [50 + n for n in numbers]))
        for run in seeded(row(5, name), column, *values)
    ]
    (outcome, *_) = [
        each
        for each in judge(claim("resnet-behind"), runs, PAPER).outcomes
        if each.difference is not None
    ]
    squares = sum((n - 5.0) ** 2 for numbers in gaps.values() for n in numbers)
    assert outcome.error == pytest.approx((squares / 4 / 3) ** 0.5)
