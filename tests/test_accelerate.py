"""``layerwise accelerate``: proposals, budgets, ranking, and complete runs on digits."""

import contextlib
import itertools
import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from layerwise import halving
from layerwise.budgets import parse_budget, parse_budgets
from layerwise.cli import build_parser, main
from layerwise.costs import Costs
from layerwise.hierarchy import Design, downsamples_earlier, fulfils_equation_7, segments, shallow_scale
from layerwise.models import published_hierarchy
from layerwise.outcome import gather
from layerwise.paper import ROWS
from layerwise.proposals import candidates, enumerate_within, mean_height, passed, propose, propose_downsampling, scale_layers
from layerwise.ranking import Ranked, expected, measured_gains, rank_by_gain, score, stage_gains
from layerwise.runs import Execution, Run, RunFolder
from layerwise.train import Interrupted
from tests.test_cli import last_json, refusal

TINY = "--width 0.0625 --train-images 120 --batch-size 16 --epochs 8 --short-epochs 2 --final-epochs 1 --device cpu"
needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="needs optuna")


def proposals(model: str, *budgets: str, **options) -> list[tuple[int, ...]]:
    costs = Costs(Run(model=model, data="cifar10", **options))
    return propose(published_hierarchy(model), parse_budgets(budgets), costs.amount, costs.resolutions)


def command(folder: Path, *more: str) -> list[str]:
    return [
        "accelerate",
        "resnet18",
        *TINY.split(),
        *["--layout", "contiguous", "--listed", "1", "--finalists", "1"],
        "--output",
        str(folder),
        "--json",
        *more,
    ]


@pytest.mark.parametrize(
    ("model", "accelerated", "others"),
    [("resnet18", ("r1", "r4", "r5"), ("r2", "r3", "e1")), ("resnet50", ("r1", "r2", "r3", "r4"), ("e1", "e2"))],
)
def test_the_papers_accelerated_hierarchies_are_among_the_proposals(model, accelerated, others):
    named = {row.name: row.hierarchy for row in ROWS}
    for budget in ("convolutions=+0", "multiply-adds=x1.0"):
        assert {named[f"{model}_{variant}"] for variant in accelerated} <= set(proposals(model, budget))
    assert {named[f"{model}_{variant}"] for variant in others}.isdisjoint(proposals(model, "convolutions=+4"))


def test_every_hierarchy_within_the_budget_is_proposed_and_no_other():
    base = (2, 2, 2, 2)
    everything = {(a, b, c, d) for a in range(1, 9) for b in range(1, 9) for c in range(1, 9) for d in range(1, 9)}
    expected_ones = {
        one for one in everything if sum(one) <= 10 and fulfils_equation_7(one, strict=False) and downsamples_earlier(one, base)
    }
    found = proposals("resnet18", "convolutions=+2")
    assert set(found) == expected_ones
    assert len(found) == len(expected_ones)


def test_proposals_come_in_the_stated_order():
    found = proposals("resnet18")
    assert found[:6] == [(1, 1, 3, 3), (1, 1, 2, 4), (1, 1, 4, 2), (1, 1, 2, 3), (1, 1, 3, 2), (1, 1, 2, 2)]
    scales = [shallow_scale(one, (32, 16, 8, 4), scale_layers((2, 2, 2, 2))) for one in found]
    assert scales == sorted(scales)
    assert found == proposals("resnet18")


def test_halving_tries_some_of_every_shallow_part():
    base, found = (3, 4, 6, 3), proposals("resnet50")
    tried = candidates(found, base, 30)
    assert {one[:2] for one in tried} == {one[:2] for one in found}
    named = {row.name: row.hierarchy for row in ROWS}
    assert {named[f"resnet50_r{number}"] for number in (1, 2, 3, 4)} <= set(tried)  # of 376
    first = {part: next(one for one in found if one[:2] == part) for part in {one[:2] for one in found}}
    assert set(tried[: len(first)]) == set(first.values())
    assert sorted(candidates(found, base, 1000)) == sorted(found)
    assert candidates(found, base, 30) == tried


def test_equation_8_and_the_scale_look_at_the_same_layers():
    for model in ("resnet18", "resnet50", "vgg16"):
        base, sides = published_hierarchy(model), Costs(Run(model=model, data="cifar10")).resolutions
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


def test_memory_is_a_budget():
    run = Run(model="resnet18", data="digits", width=0.25, batch_size=16)
    costs, base = Costs(run), (2, 2, 2, 2)
    limit = 0.9 * costs.cost(base).local_peak_bytes
    found = propose(base, parse_budgets(["memory=x0.9"]), costs.amount, costs.resolutions)
    assert found
    assert set(found) == {
        one
        for one in propose(base, parse_budgets([]), costs.amount, costs.resolutions)
        if costs.cost(one).local_peak_bytes <= limit
    } | {one for one in found if sum(one) > 8}


def moved(model: str, *budgets: str) -> list[Design]:
    costs, pools = Costs(Run(model=model, data="cifar10")), model.startswith("vgg")
    return propose_downsampling(published_hierarchy(model), parse_budgets(budgets), costs.amount, costs.resolutions, pools)


def test_every_earlier_halving_is_proposed_and_no_other():
    published = (2, 4, 6)
    wanted = set()
    for number in (3, 4):
        for places in itertools.combinations(range(8), number):
            earlier = [passed(places, layer) - passed(published, layer) for layer in range(4)]
            deep = [place for place in places if place > 4] == [6]  # deep halvings stay where they are
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
    assert {len(design.downsample_after) for design in found} == {5}  # 32 pixels halved six times would be none
    assert all(place > 0 for design in found for place in design.downsample_after)


def test_a_budget_limits_earlier_halvings():
    costs = Costs(Run(model="resnet18", data="cifar10"))
    limit = 0.6 * costs.amount("multiply-adds", (2, 2, 2, 2))
    kept = moved("resnet18", "multiply-adds=x0.6")
    assert kept == [
        one for one in moved("resnet18") if costs.amount("multiply-adds", (2, 2, 2, 2), one.downsample_after) <= limit
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
        ("resnet18 --budget parameters=1M", "has 4902090; give parameters=4902090 or more"),
        ("resnet18 --budget convolutions=3", "give convolutions=4 or more"),
        ("resnet18 --budget memory=1MB", "give memory="),
        ("resnet18 --budget memory=100GB", "add --budget convolutions=+0"),
        ("resnet18 --budget flops=3", "unknown kind of budget 'flops'"),
        ("resnet18 --budget convolutions", "has no amount"),
        ("resnet18 --budget convolutions=many", "is not understood"),
        ("resnet18 --budget memory=4", "is not a size"),
        ("resnet18 --budget convolutions=+0 --budget convolutions=9", "is given twice"),
        ("vgg11", "one convolution in every shallow stage"),
        ("resnet18 --hierarchy 2,2,2", "has 3 stages"),
        ("resnet19", "did you mean 'resnet18'"),
        ("resnet18 --search grid", "accepted: gain, halving"),
        ("resnet18 --move strides", "accepted: convolutions, downsampling"),
        ("resnet18 --move downsampling --search gain", "give --search halving with --move downsampling"),
        ("resnet18 --move downsampling --budget convolutions=7", "no earlier halving of [2,2,2,2] is within the budgets"),
        ("resnet18 --downsample-after 1,2,6", "--downsample-after is what --move downsampling proposes"),
        ("resnet18 --seeds 0", "--seeds 0 is too small"),
        ("resnet18 --short-epochs -1", "--short-epochs -1 is too small"),
        ("resnet18 --short-seeds -1", "--short-seeds -1 is too small"),
        ("resnet18 --val-fraction 0", "holds no images out to rank by"),
        ("resnet18 --at 3", "give layer or block"),
        ("resnet18 --figure front.gif", "of no known type"),
        ("resnet18 --batch-size 1", "batch_size 1 is too small"),
        ("resnet18 --data cifar", "did you mean 'cifar10'"),
    ],
)
def test_bad_input_is_refused(capsys, tmp_path, arguments, words):
    width = () if "parameters" in arguments else ("--width", "0.0625")
    given = [*arguments.split(), *width, "--output", str(tmp_path / "runs")]
    assert words in refusal(capsys, "accelerate", *given, *(() if "val-fraction" in arguments else ("--dry-run",)))
    assert not (tmp_path / "runs").exists()


def test_missing_optuna_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(halving, "find_spec", lambda name: None)
    assert "pip install 'layerwise[search]'" in refusal(capsys, *command(tmp_path, "--search", "halving"))


def test_a_dry_run_lists_costs_and_trains_nothing(capsys, tmp_path):
    main(command(tmp_path / "none", "--dry-run", "--budget", "convolutions=-2"))
    found = last_json(capsys)
    assert [one["hierarchy"] for one in found["proposals"]][:2] == [[1, 1, 2, 2], [1, 1, 1, 3]]
    assert found["base"]["hierarchy"] == [2, 2, 2, 2]
    first, second = found["proposals"][:2]
    assert (first["equation_7"], second["equation_7"], second["equation_7_weakly"]) == (True, False, True)
    assert first["global_peak_bytes"] > 0
    assert second["global_peak_bytes"] is None  # not listed
    assert second["local_peak_bytes"] > 0
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
    rows = gather([costs.cost(one) for one in hierarchies], ranked, results[:-1])
    assert [row["pareto"] for row in rows] == [False, True, True, None]  # the last has only one of its two runs
    assert [row["gain"] for row in rows] == [0.0, 5.0, -10.0, None]
    assert [row["predicted_rank"] for row in rows] == [None, 1, None, None]
    assert rows[1]["rules"]["simultaneous"]["seeds"] == 1


def test_a_search_by_gain_is_complete_and_resumes(capsys, tmp_path):
    figure = tmp_path / "front.svg"
    arguments = command(tmp_path / "runs", "--budget", "convolutions=-2", "--seeds", "2", "--figure", str(figure))
    main(arguments)
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert [row["hierarchy"] for row in found["outcome"]] == [[2, 2, 2, 2], found["ranking"][0]["hierarchy"]]
    assert [ranked["rank"] for ranked in found["ranking"]] == list(range(1, len(found["proposals"]) + 1))
    assert [len(stage) for stage in found["gains"]] == [2, 2, 2, 2]
    assert all(row["rules"]["simultaneous"]["seeds"] == 2 for row in found["outcome"])
    assert found["winner"]["hierarchy"] in [row["hierarchy"] for row in found["outcome"]]
    assert "<svg" in figure.read_text()
    for words in ("run 8 of 8, about 0:0", "stage 1 gains, points:", "Pareto front", found["command"]):
        assert words in printed
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 8
    before = [path.stat().st_mtime_ns for path in results]
    main(arguments)
    again = last_json(capsys)
    assert again["outcome"] == found["outcome"]
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
    parsed = build_parser().parse_args(words[1:])
    assert (parsed.epochs, parsed.lr, parsed.augment, parsed.width) == (8, 1e-3, False, 0.0625)
    assert parsed.hierarchy == ",".join(map(str, found["winner"]["hierarchy"]))


def test_ranking_reads_a_run_of_the_base(capsys, tmp_path):
    folders = [RunFolder(tmp_path / seed) for seed in "01"]
    for seed, folder in enumerate(folders):
        hierarchy = ["--hierarchy", "2,2,1,1,1", "--seed", str(seed)]
        main(["train", "vgg8", *hierarchy, *TINY.split()[:8], "--output", str(folder.path)])
    execution = Execution(device="cpu")
    ranking, gains = rank_by_gain([(1, 1, 1, 1, 1), (1, 1, 1, 1, 2)], folders, execution)
    assert [len(stage) for stage in gains] == [2, 2, 1, 1, 1]
    single = [measured_gains(folder, execution) for folder in folders]
    assert single[0] != single[1]
    assert gains[0][1] == pytest.approx((single[0][0][1] + single[1][0][1]) / 2)
    assert {ranked.rank for ranked in ranking} == {1, 2}
    assert ranking[0].score >= ranking[1].score


@needs_optuna
def test_successive_halving_gives_up_most_and_resumes(capsys, tmp_path):
    arguments = command(tmp_path, "--search", "halving", "--budget", "convolutions=-2", "--short-epochs", "4")
    main(arguments)
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert "short run 6 of 6" in printed
    assert "given up after epoch" in printed
    assert len(found["ranking"]) == 6
    assert found["ranking"][0]["text"].endswith("% at epoch 4")
    main(arguments)
    again = capsys.readouterr().out
    assert "short run" not in again
    assert json.loads(again.splitlines()[-1])["ranking"] == found["ranking"]


class Trained:
    """Stands for a run's folder: what was trained, and nothing on disk."""

    def __init__(self, path):
        self.path, self.entries = path, []

    def log(self):
        return self.entries

    def file(self, name):
        return self.path / name


def halved(monkeypatch, path, accuracies, stops=()):
    """The ranking of made-up accuracies after epochs 1, 3 and 9, stopped at some of the calls for training."""
    calls, made = itertools.count(), {path / str(place): value for place, value in enumerate(accuracies, start=1)}

    def train_until(run, folder, epochs, execution):
        if next(calls) in stops:
            raise Interrupted("stopped")
        folder.entries += [None] * (epochs - len(folder.entries))
        value = made[folder.path]
        return value if isinstance(value, float) else value[epochs]

    monkeypatch.setattr(halving, "train_until", train_until)
    runs = {Design((place, 2, 2)): [(Run(seed=place, epochs=9), Trained(one))] for place, one in enumerate(made, start=1)}
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return halving.rank_by_halving(runs, path, Execution()), runs


@needs_optuna
@pytest.mark.parametrize("stops", [(), (3,), (0, 4, 5, 9)])
@pytest.mark.parametrize(
    "accuracies",
    [
        (10.0, 60.0, 59.0, 58.0, 57.0, 40.0, 41.0, 42.0),  # the first goes on whatever it is worth
        tuple(float(number) for number in range(10, 90, 10)),  # each is best when it comes
        tuple(float(number) for number in range(80, 0, -10)),
    ],
)
def test_the_ranking_does_not_depend_on_when_trials_were_made(monkeypatch, tmp_path, capsys, accuracies, stops):
    ranking, runs = halved(monkeypatch, tmp_path, accuracies, stops)
    assert [ranked.score for ranked in ranking] == sorted(accuracies, reverse=True)
    assert [ranked.rank for ranked in ranking] == list(range(1, 9))
    lengths = {ranked.design: len(runs[ranked.design][0][1].log()) for ranked in ranking}
    assert lengths[ranking[0].design] == 9
    assert lengths[ranking[1].design] >= 3  # two of eight go on


@needs_optuna
def test_later_epochs_decide_among_those_that_came_so_far(monkeypatch, tmp_path, capsys):
    flat = [{1: value, 3: value, 9: value} for value in (20.0, 21.0, 22.0, 23.0, 24.0, 25.0)]
    late, early = {1: 40.0, 3: 70.0, 9: 80.0}, {1: 50.0, 3: 52.0, 9: 53.0}
    other = {1: 45.0, 3: 51.0, 9: 99.0}
    ranking, _ = halved(monkeypatch, tmp_path, [early, *flat, other, late])
    assert [ranked.text for ranked in ranking[:3]] == ["80.00 % at epoch 9", "52.00 % at epoch 3", "51.00 % at epoch 3"]
    assert [ranked.score for ranked in ranking[3:]] == [25.0, 24.0, 23.0, 22.0, 21.0, 20.0]


@needs_optuna
def test_successive_halving_compares_means_over_seeds(capsys, tmp_path):
    main(command(tmp_path, "--search", "halving", "--budget", "convolutions=-3", "--short-epochs", "3", "--short-seeds", "2"))
    ranking = last_json(capsys)["ranking"]
    assert len(ranking) > 1
    assert all(one["text"].endswith(", 2 seeds") for one in ranking)
    lengths = set()
    for one in ranking:
        text = "-".join(map(str, one["hierarchy"]))
        logs = [RunFolder(path).log() for path in (tmp_path / "short").glob(f"resnet18-{text}-*")]
        lengths |= {len(log) for log in logs}
        assert len(logs) == 2
        epoch = int(one["text"].split("at epoch ")[1].split(",")[0])
        assert one["score"] == pytest.approx(sum(log[epoch - 1]["val_accuracy"] for log in logs) / 2)
    assert lengths == {1, 3}  # compared after epoch 1, then trained to the end


@needs_optuna
def test_a_search_for_earlier_halvings_is_complete(capsys, tmp_path):
    arguments = [*command(tmp_path / "runs"), "--move", "downsampling", "--candidates", "2", "--short-epochs", "1"]
    main(arguments)
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert [one["downsample_after"] for one in found["ranking"]] in ([[0, 1, 6], [0, 2, 6]], [[0, 2, 6], [0, 1, 6]])
    assert found["outcome"][0]["downsample_after"] is None
    assert found["outcome"][1]["downsample_after"] == found["ranking"][0]["downsample_after"]
    assert found["proposals"][0]["local_peak_bytes"] > 0
    assert found["proposals"][1]["local_peak_bytes"] is None  # not listed
    assert found["proposals"][0]["segments"] == [0, 1, 5, 2]
    result = json.loads(next((tmp_path / "runs").glob("*halved*simultaneous*/result.json")).read_text())
    assert result["downsample_after"] == found["ranking"][0]["downsample_after"]
    words = shlex.split(found["command"])
    winner = found["winner"]["downsample_after"]
    assert ("--downsample-after" in words) == (winner is not None)
    main(arguments)
    assert last_json(capsys)["outcome"] == found["outcome"]


@needs_optuna
def test_two_processes_share_a_study_that_one_was_killed_in(tmp_path):
    arguments = command(tmp_path, "--search", "halving", "--budget", "convolutions=-2")
    program = [sys.executable, "-m", "layerwise", *arguments]
    killed = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith("short run 2"):
            break
    killed.kill()
    killed.wait()
    both = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    rankings = [json.loads(text.splitlines()[-1])["ranking"] for text in printed]
    assert rankings[0] == rankings[1]
    assert len(rankings[0]) == 6
    assert all("short run" in text for text in printed)
