"""The leaderboard: scores, intervals and comparisons of known records, links to them, and records that it refuses."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats
from test_report import EVIL, Page, bank, put

from report.leaderboard import boards, problems

ROOT = Path(__file__).resolve().parent.parent


def results(cls, abmilp, **others):
    """results.json of two heads with these scores of seeds 0, 1, ..."""
    probes = {}
    for head, scores in (("cls", cls), ("abmilp", abmilp)):
        template = bank(heads=(head,))["probes"][f"{head}/block11/blr0.1/seed0"]
        for seed, top1 in enumerate(scores):
            last = {**template["last"], "top1": top1}
            probes[f"{head}/block11/blr0.1/seed{seed}"] = {**template, "seed": seed, "last": last}
    return bank(**others) | {"probes": probes}


@pytest.fixture
def rows_of(tmp_path, run_script):
    """{head: {column: text}} of the only board of a folder, from the page that the script writes."""

    def read(folder):
        assert run_script("leaderboard.py", folder, "--output", tmp_path / "page.html")[0] == 0
        header, *rows = Page((tmp_path / "page.html").read_text()).rows
        rows = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
        return {row["head"]: row for row in rows}

    return read


def test_scores_have_intervals_over_images_and_seeds(tmp_path, rows_of):
    put(tmp_path / "a" / "results.json", results([40.0, 41.0, 42.0], [50.0, 52.0, 51.0]))
    row = rows_of(tmp_path)["abmilp"]
    half = 1.96 * 100 * math.sqrt(0.51 * 0.49 / 500)
    low, high = stats.t.interval(0.95, 2, 51.0, 1 / math.sqrt(3))
    assert row["top-1 (%)"] == "51.00 ± 1.00"
    assert row["95 %, images"] == f"{51 - half:.1f} to {51 + half:.1f}"
    assert row["95 %, seeds"] == f"{low:.2f} to {high:.2f}"
    assert row["of encoder"] == "85,798,656" and row["parameters of head"] == "769,000"


@pytest.mark.parametrize(
    "cls, verdict",
    [
        ([40.0, 41.0, 42.0], "real"),
        ([50.0, 51.0, 49.0], "not shown"),  # within the error over 500 images
        ([20.0, 50.0, 40.0], "not shown"),  # seeds differ more than heads
        ([40.0, 41.0], "real for these seeds"),
    ],
)
def test_a_difference_is_real_if_images_and_seeds_show_it(tmp_path, rows_of, cls, verdict):
    put(tmp_path / "a" / "results.json", results(cls, [50.0, 52.0, 51.0][: len(cls)]))
    assert rows_of(tmp_path)["abmilp"]["against [cls]"].endswith(f") {verdict}")


def test_a_comparison_in_pairs_beside_the_record_is_used(tmp_path, rows_of):
    put(tmp_path / "vit.results.json", results([50.0, 51.0, 49.0], [50.5, 51.5, 49.5]))
    row = {"name": "abmilp/block11/blr0.1", "difference_over_images": [0.2, 0.8]}
    put(tmp_path / "vit.comparison.json", {"baseline": "cls/block11/blr0.1", "probes": [row]})
    assert rows_of(tmp_path)["abmilp"]["against [cls]"] == "+0.5 (+0.2 to +0.8) real"


def test_chosen_rates_alone_are_rows_and_other_images_another_board(tmp_path, rows_of):
    record = results([40.0], [50.0])
    record["probes"]["cls/block11/blr0.1/seed0"]["chosen"] = False
    put(tmp_path / "a" / "results.json", record)
    assert list(rows_of(tmp_path)) == ["abmilp"]
    put(tmp_path / "b" / "results.json", results([40.0], [50.0], test_images="e" * 64))
    assert len(boards(tmp_path)) == 2


def test_records_of_changed_code_or_impossible_scores_are_problems(tmp_path):
    put(tmp_path / "a" / "results.json", results([40.0], [50.0]))
    assert problems(tmp_path) == []
    put(tmp_path / "b" / "results.json", results([40.0], [150.0], dirty=True))
    faults = problems(tmp_path)
    assert len(faults) == 2 and "clean" in faults[0] and "not percentages" in faults[1]
    assert problems(ROOT / "results") == []
    put(tmp_path / "c" / "results.json", bank() | {"probes": {"cls/seed0": {}}})
    with pytest.raises(ValueError, match=r"c/results\.json is not a record"):
        problems(tmp_path)


def test_the_page_links_its_records_and_no_text_of_them_is_markup(tmp_path, run_script):
    put(tmp_path / "results" / EVIL.replace("/", "|") / "results.json", results([40.0], [50.0], command=EVIL))
    code, out, _ = run_script("leaderboard.py", tmp_path / "results", "--output", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links[0].startswith("results/%3Cscript%3E") and code == 0 and "2 rows on 1 set" in out
    assert "<script>alert" not in page.raw and EVIL in page.text and page.row("mae", "vit_base_patch16", "abmilp")
    code, _, error = run_script("leaderboard.py", tmp_path / "absent")
    assert code == 2 and "no such folder" in error
    assert json.loads((tmp_path / "results" / EVIL.replace("/", "|") / "results.json").read_text())["command"] == EVIL
