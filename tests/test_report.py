"""The report: what the page holds, what it is robust against, and what it refuses.

Most runs are made up, see made_runs.py; the last test trains its own.
"""

import csv
import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import main
from layerwise.paper.over_scales import standings
from layerwise.paper.rows import ROWS
from layerwise.paper.verdicts import Evidence
from layerwise.report.curves import Depth
from layerwise.report.figure_data import Depths, all_depths
from layerwise.report.page.cells import Number
from layerwise.report.page.runs import run_cells
from layerwise.report.page.story import verdict_counts
from layerwise.report.tables import RUN_COLUMNS, SEPARABILITY_COLUMNS
from layerwise.runs.records import read_run, read_runs
from layerwise.runs.run import Run
from tests.made_runs import paper_plan, write_run, write_runs

EVIL = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of two scales, and everything that can be wrong with a folder of runs."""
    folder = tmp_path_factory.mktemp("made") / "runs"
    write_runs(folder / "small", paper_plan((5,), seeds=2), probes=True)
    write_runs(folder / "paper", paper_plan((6,), seeds=1, scale="paper", epochs=40)[:4])
    write_run(folder / "unfinished", Run(epochs=20), 50.0, 7)
    write_run(folder / EVIL.replace("/", "|"), Run(data=EVIL, epochs=3), 50.0, 3)
    spoil(folder)
    return folder


def spoil(folder: Path) -> None:
    """Add broken runs."""
    write_run(folder / "no numbers of units", Run(epochs=4, val_fraction=0.0), 50.0, 4)
    for name in ("truncated", "no result", "foreign result", "no numbers", "wrong units"):
        write_run(folder / name, Run(epochs=4), 50.0, 4)
    log = folder / "truncated" / "log.jsonl"
    log.write_text(
        log.read_text()[:-400]
        + '\n{"epoch": 5, "epo\n[1, 2]\nno JSON\n{"epoch": 9, "epochs": 4, "test_accuracy": NaN}\n'
    )
    (folder / "no result" / "result.json").unlink()
    (folder / "foreign result" / "result.json").write_text("[]")
    (folder / "no numbers" / "result.json").write_text('{"test_accuracy": "high", "units": 3}')
    for name in ("wrong units", "no numbers of units"):
        wrong = folder / name / "log.jsonl"
        wrong.write_text(
            re.sub(r'"accuracy": [\d.]+', '"accuracy": "<b>high</b>"', wrong.read_text())
        )
    (folder / "wrong units" / "separability.jsonl").write_text(
        '{"epoch": 1, "units": [3, {"index": "x"}]}\n{"units": 4}\nno\n'
    )
    for name in ("twice", "again"):
        write_run(folder / name, paper_plan((6,), seeds=1)[0].run, 20.0, 20)
    log = folder / "twice" / "log.jsonl"
    log.write_text(log.read_text() * 2)
    write_run(folder / "no log", Run(epochs=4, seed=8), 50.0, 4)
    (folder / "no log" / "log.jsonl").unlink()
    (folder / "wrong units" / "run.json").write_text(
        json.dumps(
            json.loads((folder / "wrong units" / "run.json").read_text())
            | {"machine": 3, "units": 5, "commit": ["<i>"]}
        )
    )
    (folder / "cut" / "run").mkdir(parents=True)
    (folder / "cut" / "run" / "run.json").write_text('{"format": 3, "run"')
    impossible = folder / "no percentage"
    write_run(impossible, Run(epochs=4, seed=9), 50.0, 4)
    result = json.loads((impossible / "result.json").read_text())
    (impossible / "result.json").write_text(json.dumps(result | {"test_accuracy": 5300.01}))
    (folder / "notes").mkdir()
    (folder / "notes" / "why.txt").write_text("because")
    (folder / "stray <b>.txt").write_text("?")
    (folder / "study.db").write_text("of a search")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "result.json").write_bytes(b"\xff\xfe\x00")
    (folder / "notes.txt").write_text("not a run")


class Page(HTMLParser):
    """The tables of a page by caption, the identifiers, and every address that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.identifiers: list[str] = []
        self.addresses: list[str] = []
        self.inside: list[str] = []
        self.caption = self.cell = ""
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.identifiers += [given["id"] or ""] if "id" in given else []
        self.addresses += [
            given[name] or ""
            for name in ("src", "href", "srcset", "data", "action")
            if name in given
        ]
        if tag == "table":
            self.caption, self.rows = "", []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell.strip())
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data: str) -> None:
        if "caption" in self.inside:
            self.caption += data
        self.cell += data


def written(runs: Path, tmp_path: Path, *arguments: str) -> tuple[str, Page]:
    output = tmp_path / "report.html"
    main(["report", str(runs), "--output", str(output), *arguments])
    text = output.read_text()
    return text, Page(text)


@pytest.fixture(scope="session")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return written(runs, tmp_path_factory.mktemp("page"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["report", *arguments])
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.startswith("layerwise: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_page_has_every_part_and_loads_nothing(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert {
        "headline",
        "runs-read",
        "claims",
        "tables",
        "figures",
        "epochs",
        "hierarchies",
        "runs",
        "broken",
    } <= set(parsed.identifiers)
    assert len(parsed.identifiers) == len(set(parsed.identifiers))
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert len(text) < 5e6


def test_a_papers_column_holds_the_papers_numbers_only(page: tuple[str, Page]) -> None:
    _, parsed = page
    small = parsed.tables["Table V beside what was measured at small scale."]
    printed = {row.name: row for row in ROWS if row.table == 5}
    assert small[0][1:3] == ["paper, %", "measured, small scale, %"]
    for cells in small[2:]:
        row = printed[cells[0]]
        assert cells[2:4] == [f"{row.layerwise_accuracy:.2f}", f"{row.global_accuracy:.2f}"]
        assert re.fullmatch(r"\d\d\.\d\d ± \d\.\d\d \(2\)", cells[5])
        assert float(cells[5][:5]) < 60  # the made-up small numbers
        assert float(cells[8].replace("−", "-")) == pytest.approx(
            float(cells[5][:5]) - row.layerwise_accuracy, abs=0.011
        )
    paper = next(
        name
        for name in parsed.tables
        if name.startswith("Table VI beside what was measured at paper scale")
    )
    assert "40 epochs instead of 400" in paper
    assert (
        "Table I, the paper's numbers. Nothing of it was measured in these runs." in parsed.tables
    )


def test_claims_and_the_papers_contradiction_are_shown(page: tuple[str, Page]) -> None:
    text, parsed = page
    verdicts = {
        row[0].split(" ", 1)[1] for row in parsed.tables["The paper's claims at small scale"][1:]
    }
    assert verdicts <= {"holds", "does not hold", "undecided"}
    assert "rank correlation of the rows&#39; order with the paper&#39;s" in text
    assert "62.32 %" in text.split("Where the paper contradicts itself")[1]


def test_what_is_broken_is_listed_in_words_and_escaped(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, _ = written(runs, tmp_path)
    problems = text.split('id="broken"')[1]
    for words in (
        "lines of log.jsonl that are cut short or no JSON were left out: 4",
        "lines of log.jsonl that are not of epochs were left out: 1",
        "lines of log.jsonl whose epoch comes again further down were left out: 20",
        "log.jsonl has no epoch, though the run is finished",
        "lines of separability.jsonl that are cut short or no JSON were left out: 1",
        "lines of separability.jsonl that are not of epochs were left out: 1",
        "has the same row, setting and seed, and came first with",
        "result.json has a test accuracy of 5300.01, not a percentage",
        "not of a run, and passed over: notes, notes.txt, stray &lt;b&gt;.txt",
        "not finished: 7 of 20 epochs",
        "not finished: 4 of 4 epochs, no result.json",
        "result.json has no test accuracy",
        "run.json as a run: ",
        "it is not a run, since it has no run.json",
    ):
        assert words in problems, words
    assert "<script>document.title" not in text
    assert "<img src=x" not in text
    assert "<b>high" not in text
    assert text.count("</script>") == 2
    assert "<i>" not in text
    assert "result.json has no test accuracy" in capsys.readouterr().out
    data = embedded(text)
    assert EVIL in [run["config"].get("data") for run in data["runs"]]


def test_every_run_is_there_with_its_command(page: tuple[str, Page]) -> None:
    text, parsed = page
    data = embedded(text)
    one = next(
        run
        for run in data["runs"]
        if "resnet18-1-1-2-2" in run["path"] and "simultaneous" in run["path"]
    )
    assert one["command"].startswith("layerwise train resnet18 --hierarchy 1,1,2,2")
    assert one["epochs"][-1] == 20
    assert [(found["kind"], found["axis"]) for found in one["units"]] == [
        ("accuracy of each unit's own classifier, held-out images", "accuracy, %"),
        ("accuracy of a linear probe of each unit's features", "accuracy, %"),
        ("effective rank of each unit's features", "effective rank"),
        ("gain of each unit, its output's separability less its input's", "points"),
    ]
    assert (
        one["units"][2]["values"][4][0] == 6.5
    )  # the fifth, counting from the image, after the first measured epoch
    assert [f"run-{index}" in parsed.identifiers for index in range(len(data["runs"]))] == [
        True
    ] * len(data["runs"])


def test_the_same_runs_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(runs, tmp_path / name, "--figures", str(tmp_path / name / "figures"))
    first, second = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert [path.name for path in first] == [path.name for path in second]
    figures = embedded((tmp_path / "one" / "report.html").read_text())["figures"]
    assert {path.stem for path in first if path.suffix != ".html"} == set(figures)
    assert {path.suffix for path in first} == {".html", ".svg", ".png"}
    assert {"figure-1-paper.svg", "figure-4-small.svg", "depth-5-resnet18-small.png"} <= {
        path.name for path in first
    }
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_only_files_of_figures_need_matplotlib(
    page: tuple[str, Page],
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("layerwise.report.find_spec", lambda name: None)
    assert written(runs, tmp_path)[0] == page[0]
    assert "pip install 'layerwise[plots]'" in refusal(
        capsys, str(runs), "--figures", str(tmp_path / "figures")
    )
    assert not (tmp_path / "figures").exists()


def test_a_file_s_map_over_depth_is_of_the_mean_over_seeds() -> None:
    draw = pytest.importorskip("layerwise.report.figures.depth").draw
    seeds = [
        Depth(("stem", "output"), (1, 2), ((value, value + 1), (value + 2, value + 3)), "probe")
        for value in (10.0, 20.0)
    ]
    figure = draw(Depths("name", "title", "caption", "probe", {"layerwise": seeds}))
    [drawn] = figure.axes[0].collections  # epochs upwards, depth to the right
    assert drawn.get_array().tolist() == [[15, 17], [16, 18]]


def test_depth_is_drawn_at_every_scale_row_by_row(tmp_path: Path) -> None:
    for scale in ("small", "middle"):
        for loss in ("predsim", "pred"):
            planned = paper_plan((5,), seeds=1, scale=scale, loss=loss)
            chosen = [item for item in planned if item.rows[0].name in ("resnet18", "resnet18_r4")]
            write_runs(tmp_path / scale / loss, chosen, probes=True)
    evidence = Evidence(read_runs([tmp_path])[0], ())
    names = [figure.name for figure in all_depths(evidence)]
    rows = [name.split("-")[2:4] for name in names]
    scales = ["middle", "small"]
    assert rows == [[row, scale] for row in ("resnet18", "resnet18_r4") for scale in scales]
    *_, together = verdict_counts(evidence)
    decided = Counter(standing.verdict for standing in standings(evidence))
    assert together.startswith(f"Together they measure {decided.total()}; each judged by the first")
    assert all(f"{number} {verdict}" in together for verdict, number in decided.items())


def embedded(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    data: dict[str, Any] = json.loads(
        text.split('id="data">')[1].split("</script>")[0], parse_constant=pytest.fail
    )
    return data


def test_every_figure_is_on_the_page_as_charts(page: tuple[str, Page]) -> None:
    text, parsed = page
    figures = embedded(text)["figures"]
    assert {f"figure-{name}" for name in figures} <= set(parsed.identifiers)
    assert {figure["kind"] for figure in figures.values()} == {"bars", "lines", "depths"}
    assert "data:image/" not in text


def test_charts_hold_the_numbers_of_the_figures(page: tuple[str, Page]) -> None:
    text, parsed = page
    data = embedded(text)
    printed = data["figures"]["figure-1-paper"]["panels"][1]
    resnet18 = printed["labels"].index(["resnet18", "[2,2,2,2]"])
    assert [bar["values"][resnet18] for bar in printed["bars"]] == [
        62.32,
        72.45,
    ]  # CIFAR-100, Table IV

    row = parsed.tables["Table V beside what was measured at small scale."][2]
    line = data["figures"]["figure-4-small"]["panels"][0]["series"][0]
    assert (row[0], line["name"], line["seeds"]) == ("resnet18", "resnet18 [2,2,2,2]", 2)
    assert 100 - line["values"][-1] == pytest.approx(float(row[5].split()[0]), abs=0.011)
    assert line["spread"][-1] == pytest.approx(float(row[5].split()[2]), abs=0.011)

    layerwise, globally = data["figures"]["depth-5-resnet18-small"]["panels"]
    assert (layerwise["kind"], globally["kind"]) == ("layer-wise", "global")
    probed = [
        run for run in data["runs"] if "small/resnet18-2-2-2-2-cifar10-simultaneous" in run["path"]
    ]
    deepest = [run["separable"]["measures"]["linear probe, %"][-1] for run in probed]
    assert len(deepest) == 2
    assert layerwise["values"][-1][-1] == pytest.approx(sum(deepest) / 2, abs=0.06)
    assert layerwise["spread"][-1][-1] == pytest.approx(
        abs(deepest[0] - deepest[1]) / 2**0.5, abs=0.06
    )


def test_tables_of_an_earlier_version_are_written_over(runs: Path, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    for path, columns in (
        (table, RUN_COLUMNS),
        (tmp_path / "runs-separability.csv", SEPARABILITY_COLUMNS),
    ):
        path.write_text(",".join(columns[:-2]) + "\n")  # two columns came later
    main(["report", str(runs), "--output", str(tmp_path / "r.html"), "--csv", str(table)])
    assert table.read_text().startswith(",".join(RUN_COLUMNS))


def test_csv_latex_and_json(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--csv", str(tmp_path / "runs.csv"), "--latex", str(tmp_path / "latex"), "--json"]
    for _ in range(2):  # what it wrote, it may write over
        written(runs, tmp_path, *arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["report"] == str(tmp_path / "report.html")
    assert all(Path(path).is_file() for path in result["files"])
    assert result["finished"] < result["runs"]
    assert (tmp_path / "runs.csv").read_text().splitlines()[0] == ",".join(RUN_COLUMNS)
    assert (tmp_path / "runs-claims.csv").read_text().startswith("setting,claim,")
    lines = (tmp_path / "runs-separability.csv").read_text().splitlines()
    assert lines[0] == ",".join(SEPARABILITY_COLUMNS)
    fourth = next(csv.DictReader([lines[0], lines[4]]))
    assert (fourth["epoch"], fourth["depth"], fourth["unit"]) == ("1", "3", "stages.2.conv")
    assert (
        fourth["resolution"],
        fourth["gain"],
        fourth["mismatched"],
        fourth["nearest_class_mean"],
    ) == (
        "8×8",
        "1.25",
        "yes",
        "",
    )
    assert 20 < float(fourth["linear_probe"]) < 60
    assert r"resnet18\_r4" in (tmp_path / "latex" / "table-5-small.tex").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{tmp}/none", "Give folders of runs"),
        ("{tmp}", "there is no run in"),
        ("{tmp}/mine.html", "mine.html is a file. Give a folder of runs; unpack an archive"),
        ("{runs} --output {tmp}", "it is a folder. Give a file"),
        ("{runs} --output {tmp}/none/report.html", "it lies in a folder that does not exist"),
        ("{runs} --output {tmp}/mine.html", "it exists and was not written by layerwise report"),
        (
            "{runs} --output {tmp}/r.html --csv {tmp}/mine.html",
            "it exists and was not written by layerwise report",
        ),
        ("{runs} --output {tmp}/r.html --figures {tmp}/mine.html", "is a file. Give a folder"),
        ("{runs} --output {tmp}/r.html --latex {tmp}/mine.html", "is a file. Give a folder"),
        ("{runs} --output {tmp}/r.html --csv {tmp}/r.html", "--csv and --output into one file"),
        (
            "{runs} --output {tmp}/r-claims.csv --csv {tmp}/r.csv",
            "--csv and --output into one file",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: str,
    words: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("<html><head><title>mine</title></head></html>")
    assert words in refusal(capsys, *arguments.format(tmp=tmp_path, runs=runs).split())
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.html"]
    assert "mine" in (tmp_path / "mine.html").read_text()


def test_no_half_written_page(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = written(runs, tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layerwise.utils.files.os.fsync", full)
    with pytest.raises(SystemExit):
        main(["report", str(runs), "--output", str(tmp_path / "report.html")])
    assert (tmp_path / "report.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_many_long_runs_quickly_and_without_torch(tmp_path: Path) -> None:
    """A tenth of 1,000 runs of 400 epochs; those take 7 s, in 3.8 MB (docs/log.md)."""
    write_runs(tmp_path / "runs", paper_plan((1, 2, 3, 4, 5, 6), seeds=1, scale="paper")[:100])
    code = (
        "import sys, time; from layerwise.cli import main; main(['report', "
        f"{str(tmp_path / 'runs')!r}, '--output', {str(tmp_path / 'report.html')!r}]); assert not "
        "{'torch', 'matplotlib'} & set(sys.modules); print(time.process_time())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "100 runs read, 100 of them finished" in done.stdout
    assert float(done.stdout.splitlines()[-1]) < 10
    assert time.monotonic() - began < 60  # hangs only
    assert (tmp_path / "report.html").stat().st_size < 4e6


def test_a_measure_of_ones_own_is_shown_by_the_heading_that_was_recorded(tmp_path: Path) -> None:
    """The report has no torch, so it cannot ask the measure itself."""
    write_runs(tmp_path / "runs", paper_plan((5,), seeds=1)[:1], probes=True)
    [path] = (tmp_path / "runs").glob("*/separability.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["headings"] = {"mine": "my <measure>, %"}
        for row in line["units"]:
            row["mine"] = 12.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    csv_file = tmp_path / "runs.csv"
    page = tmp_path / "report.html"
    main(["report", str(tmp_path / "runs"), "--output", str(page), "--csv", str(csv_file)])
    [run] = embedded(page.read_text())["runs"]
    assert set(run["separable"]["measures"]["my <measure>, %"]) == {12.5}
    assert any("my <measure>" in depth["kind"] for depth in run["units"])
    with (tmp_path / "runs-separability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["mine"] for row in rows} == {"12.5"}
    behind = SEPARABILITY_COLUMNS.index("cka")
    assert tuple(rows[0]) == (
        *SEPARABILITY_COLUMNS[:behind],
        "mine",
        *SEPARABILITY_COLUMNS[behind:],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that ``layerwise train`` wrote: a layer-wise one and a global one."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = "--data digits --train-images 600 --width 0.125 --epochs 2 --batch-size 16 --lr 1e-3"
    for rule in ("simultaneous", "global"):
        arguments = (
            f"train vgg8 {tiny} --rule {rule} --separability-every 1 --output {folder / rule}"
        )
        main(arguments.split())
    return folder


def test_epochs_of_a_sequential_run_are_those_of_all_units(tmp_path: Path) -> None:
    run = Run(rule="sequential", epochs=2)
    write_run(tmp_path / "run", run, 50.0, 2, units=3)
    record = read_run(tmp_path / "run")[0]
    epochs = tuple({"epoch": number + 1, "epochs": 6} for number in range(4))
    assert run_cells(replace(record, epochs=epochs))[7] == Number(4, "4 of 6")


@pytest.mark.parametrize("rule", ["simultaneous", "global"])
def test_a_page_of_trained_runs_shows_their_numbers(
    rule: str, trained: Path, tmp_path: Path
) -> None:
    text, parsed = written(trained, tmp_path)
    result = json.loads((trained / rule / "result.json").read_text())
    epochs = [json.loads(line) for line in (trained / rule / "log.jsonl").read_text().splitlines()]
    lines = (trained / rule / "separability.jsonl").read_text().splitlines()
    data = embedded(text)
    run = next(run for run in data["runs"] if Path(run["path"]).name == rule)

    row = next(
        row for row in parsed.tables["All runs; each name leads to its details"] if row[3] == rule
    )
    assert row[8:10] == ["2 of 2", f"{result['test_accuracy']:.2f}"]
    assert run["test"] == [round(epoch["test_accuracy"], 2) for epoch in epochs]
    assert run["result"]["parameters"] == result["parameters"]
    assert data["names"][run["last"]["names"]] == [unit["name"] for unit in epochs[-1]["units"]]
    assert run["last"]["loss"] == [round(unit["loss"], 4) for unit in epochs[-1]["units"]]

    measured = json.loads(lines[-1])["units"]
    separable = run["separable"]
    assert len(lines) == len(epochs) == separable["epoch"] == 2
    assert data["names"][separable["names"]] == [unit["name"] for unit in measured]
    assert len(measured) > 2
    probes = [round(unit["linear_probe"], 2) for unit in measured]
    assert separable["measures"]["linear probe, %"] == probes
    depth = next(depth for depth in run["units"] if "linear probe" in depth["kind"])
    assert [values[-1] for values in depth["values"]] == pytest.approx(probes, abs=0.051)
    assert "Everything in the folders was read in full." in text
