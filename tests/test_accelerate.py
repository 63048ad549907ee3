"""``layerwise accelerate``: proposals, budgets, ranking, and complete runs on digits."""

import itertools
import json
import shlex
from pathlib import Path

import pytest

from layerwise.cli import main, parse
from layerwise.experiments.accelerate import train_command
from layerwise.experiments.accelerate.budgets import parse_budget, parse_budgets
from layerwise.experiments.accelerate.costs import Costs
from layerwise.experiments.accelerate.proposals import (
    enumerate_within,
    mean_height,
    passed,
    propose,
    propose_downsampling,
    scale_layers,
)
from layerwise.experiments.accelerate.ranking import (
    Ranked,
    expected,
    mean_gains,
    measured_gains,
    rank_by_count,
    rank_by_gain,
    score,
    stage_gains,
)
from layerwise.experiments.accelerate.results import result_rows
from layerwise.hierarchy import (
    Design,
    downsamples_earlier,
    fulfils_equation_7,
    segments,
    shallow_scale,
)
from layerwise.models import published_hierarchy
from layerwise.paper.rows import ROWS
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.utils.plugins import IMPORTED
from tests.test_cli import last_json, refusal

TINY = "--width 0.0625 --train-images 120 --batch-size 16 --epochs 4 --final-epochs 1 --device cpu"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def proposals(model: str, *budgets: str, **options) -> list[tuple[int, ...]]:
    costs = Costs(Run(model=model, data="cifar10", **options))
    return propose(
        published_hierarchy(model), parse_budgets(budgets), costs.amount, costs.resolutions
    )


def command(folder: Path, *more: str) -> list[str]:
    return [
        "accelerate",
        "resnet18",
        *TINY.split(),
        *["--memory-format", "contiguous", "--listed", "1", "--finalists", "1"],
        "--output",
        str(folder),
        "--json",
        *more,
    ]


@pytest.mark.parametrize(
    ("model", "accelerated", "others"),
    [
        ("resnet18", ("r1", "r4", "r5"), ("r2", "r3", "e1")),
        ("resnet50", ("r1", "r2", "r3", "r4"), ("e1", "e2")),
    ],
)
def test_the_papers_accelerated_hierarchies_are_among_the_proposals(model, accelerated, others):
    named = {row.name: row.hierarchy for row in ROWS}
    for budget in ("convolutions=+0", "multiply-adds=x1.0"):
        assert {named[f"{model}_{variant}"] for variant in accelerated} <= set(
            proposals(model, budget)
        )
    assert {named[f"{model}_{variant}"] for variant in others}.isdisjoint(
        proposals(model, "convolutions=+4")
    )


def test_every_hierarchy_within_the_budget_is_proposed_and_no_other():
    base = (2, 2, 2, 2)
    everything = {
        (a, b, c, d)
        for a in range(1, 9)
        for b in range(1, 9)
        for c in range(1, 9)
        for d in range(1, 9)
    }
    expected_ones = {
        one
        for one in everything
        if sum(one) <= 10
        and fulfils_equation_7(one, strict=False)
        and downsamples_earlier(one, base)
    }
    found = proposals("resnet18", "convolutions=+2")
    assert set(found) == expected_ones
    assert len(found) == len(expected_ones)


def test_proposals_come_in_the_stated_order():
    found = proposals("resnet18")
    assert found[:6] == [
        (1, 1, 3, 3),
        (1, 1, 2, 4),
        (1, 1, 4, 2),
        (1, 1, 2, 3),
        (1, 1, 3, 2),
        (1, 1, 2, 2),
    ]
    scales = [shallow_scale(one, (32, 16, 8, 4), scale_layers((2, 2, 2, 2))) for one in found]
    assert scales == sorted(scales)
    assert found == proposals("resnet18")


def test_equation_8_and_the_scale_look_at_the_same_layers():
    for model in ("resnet18", "resnet50", "vgg16"):
        base, sides = (
            published_hierarchy(model),
            Costs(Run(model=model, data="cifar10")).resolutions,
        )
        own = shallow_scale(base, sides, scale_layers(base))
        assert all(shallow_scale(one, sides, scale_layers(base)) < own for one in proposals(model))


def test_budgets_hold_together():
    costs = Costs(Run(model="vgg16", data="cifar10"))
    found = proposals("vgg16", "convolutions=+2", "parameters=x1.2", "multiply-adds=-50M")
    base = published_hierarchy("vgg16")
    for kind, limit in (
        ("convolutions", sum(base) + 2),
        ("parameters", 1.2 * costs.amount("parameters", base)),
        ("multiply-adds", costs.amount("multiply-adds", base) - 50e6),
    ):
        amounts = [costs.amount(kind, one) for one in found]
        assert max(amounts) <= limit
    assert set(found) < set(proposals("vgg16", "convolutions=+2"))


@pytest.mark.slow
def test_memory_is_a_budget():
    run = Run(model="resnet18", data="digits", width=0.25, batch_size=16)
    costs, base = Costs(run), (2, 2, 2, 2)
    budgets = parse_budgets(["memory=x0.9"])
    assert [budget.text for budget in budgets] == ["convolutions=+0", "memory=x0.9"]
    limit = budgets[1].limit(costs.cost(base).local_peak_bytes)
    proposed = propose(base, budgets, costs.amount, costs.resolutions)
    designs = [Design(one) for one in proposed[::3]]
    within = list(costs.within_memory(designs, limit))
    assert within == [one for one in designs if costs.cost(one.hierarchy).local_peak_bytes <= limit]
    assert 0 < len(within) < len(designs)


def test_memory_is_not_predicted_of_what_is_larger_than_too_large(monkeypatch):
    costs, looked_at = Costs(Run(model="resnet18", data="digits")), []

    def amount(kind, hierarchy, downsample_after):
        looked_at.append(hierarchy)
        return 10

    monkeypatch.setattr(costs, "amount", amount)
    designs = [Design((1, 1, 2, 2)), Design((1, 1, 3, 2)), Design((1, 1, 1, 4))]
    assert list(costs.within_memory(designs, 9)) == []
    assert looked_at == [(1, 1, 2, 2), (1, 1, 1, 4)]


def moved(model: str, *budgets: str) -> list[Design]:
    costs, pools = Costs(Run(model=model, data="cifar10")), model.startswith("vgg")
    return propose_downsampling(
        published_hierarchy(model), parse_budgets(budgets), costs.amount, costs.resolutions, pools
    )


def test_every_earlier_halving_is_proposed_and_no_other():
    published = (2, 4, 6)
    wanted = set()
    for number in (3, 4):
        for places in itertools.combinations(range(8), number):
            earlier = [passed(places, layer) - passed(published, layer) for layer in range(4)]
            # deep halvings stay where they are
            deep = [place for place in places if place > 4] == [6]
            between = fulfils_equation_7(segments(Design((2, 2, 2, 2), places)), strict=False)
            if min(earlier) >= 0 and max(earlier) > 0 and deep and between:
                wanted.add(places)
    found = moved("resnet18")
    assert {design.downsample_after for design in found} == wanted
    assert found[2].text == "[2,2,2,2] halved after 1,2,6"
    keys = [(len(design.downsample_after), mean_height(design, 32, 4)) for design in found]
    assert keys == sorted(keys)


def test_a_pooling_network_never_pools_a_single_pixel():
    found = moved("vgg16")
    assert found[0].downsample_after == (1, 2, 7, 10, 13)
    # 32 pixels halved six times would be none
    assert {len(design.downsample_after) for design in found} == {5}
    assert all(place > 0 for design in found for place in design.downsample_after)


def test_a_budget_limits_earlier_halvings():
    costs = Costs(Run(model="resnet18", data="cifar10"))
    limit = 0.6 * costs.amount("multiply-adds", (2, 2, 2, 2))
    kept = moved("resnet18", "multiply-adds=x0.6")
    assert kept == [
        one
        for one in moved("resnet18")
        if costs.amount("multiply-adds", (2, 2, 2, 2), one.downsample_after) <= limit
    ]
    assert 0 < len(kept) < len(moved("resnet18"))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("convolutions=+2", 10),
        ("convolutions=-1", 7),
        ("parameters=x1.5", 12),
        ("parameters=11M", 11e6),
        ("memory=+1GB", 8 + 1e9),
    ],
)
def test_budgets_in_words(text, limit):
    assert parse_budget(text).limit(8) == limit


def test_enumeration_ends_where_nothing_fits():
    assert list(enumerate_within((2, 2, 2, 2), lambda hierarchy: False)) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resnet18 --budget parameters=1M", "has 4902090. Give parameters=4902090 or more"),
        ("resnet18 --budget convolutions=3", "Give convolutions=4 or more"),
        ("resnet18 --budget memory=1MB", "Give memory="),
        ("resnet18 --budget multiply-adds=1000000G", "Add --budget convolutions=+0"),
        ("resnet18 --budget flops=3", "Cannot use kind of budget 'flops'"),
        ("resnet18 --budget convolutions", "has no amount"),
        ("resnet18 --budget convolutions=many", "is not understood"),
        ("resnet18 --budget memory=4", "it is not a size"),
        ("resnet18 --budget convolutions=+0 --budget convolutions=9", "is given twice"),
        ("vgg11", "one convolution in every shallow stage"),
        ("resnet18 --hierarchy 2,2,2", "has 3 stages"),
        ("resnet19", "Did you mean 'resnet18'"),
        ("resnet18 --rank grid", "Accepted: count, gain"),
        ("resnet18 --rank gain", "--dry-run trains nothing"),
        ("resnet18 --figure f.svg", "Cannot use --figure with --dry-run"),
        ("resnet18 --move strides", "Accepted: convolutions, downsampling"),
        (
            "resnet18 --move downsampling --rank gain",
            "Cannot use --rank gain with --move downsampling",
        ),
        (
            "resnet18 --hierarchy 1,1,1,1 --move downsampling --budget memory=1MB",
            "Cannot keep to --budget memory=1MB: no proposal is within it",
        ),
        (
            "resnet18 --move downsampling --budget convolutions=7",
            "no earlier halving of [2,2,2,2] is within the budgets",
        ),
        (
            "resnet18 --downsample-after 1,2,6",
            "Cannot use --downsample-after: it is what --move downsampling proposes",
        ),
        ("resnet18 --seeds 0", "Cannot use --seeds 0: it is out of range. Give 1 or more"),
        (
            "resnet18 --final-epochs -1",
            "Cannot use --final-epochs -1: it is out of range. Give 0 or more",
        ),
        ("resnet18 --val-fraction 0", "holds no images out to rank by"),
        ("resnet18 --val-fraction 0.001", "of so few images it holds none out"),
        ("resnet18 --at 3", "Give layer or block"),
        ("resnet18 --figure front.gif", "of no known type"),
        ("resnet18 --batch-size 1", "--batch-size 1: it is out of range. Give 2 or more"),
        ("resnet18 --data cifar", "Did you mean 'cifar10'"),
    ],
)
def test_bad_input_is_refused(capsys, tmp_path, arguments, words):
    width = () if "parameters" in arguments else ("--width", "0.0625")
    given = [*arguments.split(), *width, "--output", str(tmp_path / "runs")]
    assert words in refusal(
        capsys, "accelerate", *given, *(() if "val-fraction" in arguments else ("--dry-run",))
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_dry_run_lists_costs_and_trains_nothing(capsys, tmp_path):
    main(command(tmp_path / "none", "--dry-run", "--budget", "convolutions=-2", "--listed", "2"))
    found = last_json(capsys)
    assert [one["hierarchy"] for one in found["proposals"]] == [[1, 1, 2, 2], [1, 1, 1, 3]]
    counts = [ranked["score"] for ranked in found["ranking"]]
    assert counts == sorted(counts)
    assert len(counts) == 6
    assert found["base"]["hierarchy"] == [2, 2, 2, 2]
    first, second = found["proposals"][:2]
    assert (first["equation_7"], second["equation_7"], second["equation_7_weakly"]) == (
        True,
        False,
        True,
    )
    assert first["global_peak_bytes"] > 0
    assert found["budgets"] == [{"budget": "convolutions=-2", "kind": "convolutions", "limit": 6.0}]
    assert found["winner"] is None
    assert not (tmp_path / "none").exists()


def test_gains_make_scores():
    rows = [
        {"name": "image", "gain": None},
        {"name": "stem.conv", "gain": 9.0},
        {"name": "stages.0.0.conv1", "gain": 4.0},
        {"name": "stages.0.0.conv2", "gain": 1.0},
        {"name": "stages.0.1.conv1", "gain": -2.0},
        {"name": "stages.0.1.conv2", "gain": None},
        {"name": "stages.1.0.conv1", "gain": 3.0},
        {"name": "output", "gain": 1.0},
    ]
    gains = stage_gains(rows)
    assert gains == [[5.0, -2.0], [3.0]]
    assert score((2, 1), gains) == 6.0
    assert score((1, 1), gains) == 8.0  # the shallow one that took away is given up
    assert score((1, 3), gains) == pytest.approx(8 + 3 / 2 + 3 / 3)
    assert expected(3, [5.0, -2.0]) == 2.0  # more of what harms harms, half as much


def test_the_pareto_front_and_what_is_gained():
    costs = Costs(Run(model="resnet18", data="digits", width=1 / 16, batch_size=8))
    hierarchies = [(2, 2, 2, 2), (1, 1, 2, 2), (1, 1, 1, 1), (1, 1, 3, 3)]
    results = [
        {
            "hierarchy": list(hierarchy),
            "rule": rule,
            "test_accuracy": accuracy,
            "val_accuracy": accuracy,
            "parameters": 1,
            "peak_memory_bytes": None,
            "train_seconds": 1.0,
        }
        for hierarchy, accuracy in zip(hierarchies, (80.0, 85.0, 70.0, 84.0), strict=True)
        for rule in ("simultaneous", "global")
    ]
    ranked = [Ranked(Design((1, 1, 2, 2)), 1, 2.0, "+2.00 points")]
    rows = result_rows([costs.cost(one) for one in hierarchies], ranked, results)
    assert [row["pareto"] for row in rows] == [False, True, True, False]
    assert [row["gain"] for row in rows] == [0.0, 5.0, -10.0, 4.0]
    assert [row["predicted_rank"] for row in rows] == [None, 1, None, None]
    assert rows[1]["rules"]["simultaneous"]["seeds"] == 1


@pytest.mark.slow
def test_a_search_by_gain_is_complete_and_resumes(capsys, tmp_path):
    figure = tmp_path / "front.svg"
    more = ["--rank", "gain", "--budget", "convolutions=-2", "--seeds", "2"]
    arguments = command(tmp_path / "runs", *more, "--figure", str(figure))
    main(arguments)
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    hierarchies = [row["hierarchy"] for row in found["results"]]
    assert hierarchies == [[2, 2, 2, 2], found["ranking"][0]["hierarchy"]]
    assert [ranked["rank"] for ranked in found["ranking"]] == [1, 2, 3, 4, 5, 6]
    assert found["proposals"][0]["hierarchy"] == found["ranking"][0]["hierarchy"]
    assert [len(stage) for stage in found["gains"]] == [2, 2, 2, 2]
    assert all(row["rules"]["simultaneous"]["seeds"] == 2 for row in found["results"])
    assert found["winner"]["hierarchy"] in hierarchies
    assert "<svg" in figure.read_text()
    for words in (
        "run 8 of 8, about 0:0",
        "stage 1 gains, points:",
        "Pareto front",
        found["command"],
    ):
        assert words in printed
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 8
    before = [path.stat().st_mtime_ns for path in results]
    main(arguments)
    again = last_json(capsys)
    assert again["results"] == found["results"]
    assert again["ranking"] == found["ranking"]
    assert [path.stat().st_mtime_ns for path in results] == before
    results[0].unlink()
    main(arguments)
    assert "already finished" in capsys.readouterr().out
    assert results[0].exists()


def test_the_printed_command_trains_the_winner_at_full_length(capsys, tmp_path):
    main(command(tmp_path, "--budget", "convolutions=4", "--lr", "1e-3", "--no-augment"))
    found = last_json(capsys)
    words = shlex.split(found["command"])
    assert words[:3] == ["layerwise", "train", "resnet18"]
    parsed = parse(words[1:])
    assert (parsed.epochs, parsed.lr, parsed.augment, parsed.width) == (4, 1e-3, False, 0.0625)
    assert parsed.hierarchy == ",".join(map(str, found["winner"]["hierarchy"]))


def test_ranking_reads_a_run_of_the_base(capsys, tmp_path):
    folder, hierarchy = RunFolder(tmp_path / "run"), ["--hierarchy", "2,2,1,1,1"]
    main(["train", "vgg8", *hierarchy, *TINY.split()[:8], "--output", str(folder.path)])
    gains = measured_gains(folder, Execution(device="cpu"))
    ranking = rank_by_gain([Design((1, 1, 1, 1, 1)), Design((1, 1, 1, 1, 2))], gains)
    assert [len(stage) for stage in gains] == [2, 2, 1, 1, 1]
    assert {ranked.rank for ranked in ranking} == {1, 2}
    assert ranking[0].score >= ranking[1].score


def test_gains_are_averaged_place_by_place():
    assert mean_gains([[[1.0, 3.0], [5.0]], [[2.0, 1.0], [-1.0]]]) == [[1.5, 2.0], [2.0]]


def test_fewest_shallow_convolutions_come_first():
    ordered = [(2, 1, 2, 2), (1, 1, 2, 2), (1, 2, 2, 2), (1, 1, 3, 3)]
    ranking = rank_by_count([Design(one) for one in ordered])
    hierarchies = [ranked.design.hierarchy for ranked in ranking]
    assert hierarchies == [(1, 1, 2, 2), (1, 1, 3, 3), (2, 1, 2, 2), (1, 2, 2, 2)]
    assert [(ranked.rank, ranked.score) for ranked in ranking] == [(1, 2), (2, 2), (3, 3), (4, 3)]
    assert ranking[3].text == "3 shallow"


@pytest.mark.slow
def test_a_search_for_earlier_halvings_is_complete(capsys, tmp_path):
    arguments = [*command(tmp_path / "runs"), "--move", "downsampling"]
    main(arguments)
    found = last_json(capsys)
    places = [one["downsample_after"] for one in found["ranking"]]
    assert places[:2] == [[0, 1, 6], [0, 2, 6]]
    assert [row["downsample_after"] for row in found["results"]] == [None, [0, 1, 6]]
    assert [one["downsample_after"] for one in found["proposals"]] == [[0, 1, 6]]  # listed
    assert found["proposals"][0]["segments"] == [0, 1, 5, 2]
    result = next((tmp_path / "runs").glob("*halved*simultaneous*/result.json"))
    assert json.loads(result.read_text())["downsample_after"] == [0, 1, 6]
    words = shlex.split(found["command"])
    winner = found["winner"]["downsample_after"]
    assert ("--downsample-after" in words) == (winner is not None)
    main(arguments)
    assert last_json(capsys)["results"] == found["results"]


@pytest.mark.slow
def test_a_budget_of_memory_limits_what_is_shown(capsys, tmp_path):
    main(command(tmp_path, "--dry-run", "--budget", "memory=x1.0", "--listed", "2"))
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    limit = found["base"]["local_peak_bytes"]
    assert "convolutions=+0, the first within memory=x1.0" in printed
    assert [budget["limit"] for budget in found["budgets"]] == [8, limit]
    assert len(found["proposals"]) == 2
    assert all(one["local_peak_bytes"] <= limit for one in found["proposals"])


def test_halving_in_the_benchmarks_ranks_by_how_far_designs_came(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import halving

    flat = {f"flat {value}": dict.fromkeys((1, 3, 9), value) for value in (20.0, 21.0, 22.0)}
    values = {
        "early": {1: 50.0, 3: 52.0, 9: 53.0},
        **flat,
        "rival": {1: 45.0, 3: 51.0, 9: 99.0},
        "late": {1: 40.0, 3: 70.0, 9: 80.0},
        **{f"more {value}": dict.fromkeys((1, 3, 9), value) for value in (23.0, 24.0, 25.0)},
    }
    ranking = halving.places(list(values), 9, values)
    assert ranking[:3] == [("late", 9), ("early", 3), ("rival", 3)]
    assert [name for name, _ in ranking[3:6]] == ["more 25.0", "more 24.0", "more 23.0"]
    assert {epochs for _, epochs in ranking[3:]} == {1}
    assert list(halving.rungs(9)) == [1, 3, 9]


def test_halving_in_the_benchmarks_trains_fewer_and_fewer_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import halving

    sizes = {"data": "digits", "width": 1 / 16, "train_images": 120, "batch_size": 16}
    base, designs = Run(model="vgg8", epochs=3, **sizes), [(1, 1, 1, 1, n) for n in (1, 2, 3)]
    arguments = base, [Design(one) for one in designs], tmp_path, Execution(device="cpu")
    values, ranking = halving.halve(*arguments)
    lengths = sorted(len(RunFolder(path).log()) for path in tmp_path.iterdir())
    assert lengths == [1, 1, 3]
    assert [epochs for _, epochs in ranking] == [3, 1, 1]
    assert values[ranking[1][0]][1] >= values[ranking[2][0]][1]
    assert halving.halve(*arguments) == (values, ranking)


def test_the_printed_command_imports_what_the_run_needs(monkeypatch):
    monkeypatch.setitem(IMPORTED, "my_loss.py", "digest")
    assert "--import my_loss.py" in train_command(Run(), Execution())
