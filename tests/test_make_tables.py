"""Tables of records: what was measured beside what the paper has, and never a silent comparison of unlike things."""

import json
import sys
from pathlib import Path

import pytest

from cli.console import run_main
from paper import cells, shown
from paper.cells import Cell, Measurement
from paper.tables import TABLES, rows_of, table_of
from scripts import make_tables as program
from scripts import plot_bars

ROOT = Path(__file__).resolve().parent.parent


def record(model, arch, quantity, head, values, dataset="imagenet1k", obstacles=(), notes=(), dirty=False, **settings):
    demo = dataset.startswith("demo")
    counts = {"n_train": 20, "n_test": 10} if demo else {"n_train": 1_281_167, "n_test": 50_000}
    origin = {"test_images": "0123456789", "n_val": 0, "commit": "abc", "dirty": dirty, "versions": {}}
    settings = ({"epochs": 90} if quantity == "top1" else {}) | settings
    cell, seeds = Cell(dataset, model, arch, quantity, head), list(range(len(values)))
    return Measurement(cell, values, seeds, settings, list(notes), list(obstacles), {**counts, **origin})


def put(folder, measured):
    path = folder / measured.cell.dataset / f"{'.'.join(measured.cell[1:])}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**vars(measured), "path": ""}))


def get(path):
    content = json.loads(path.read_text())
    return [Measurement(**{**content, "cell": Cell(*content["cell"])})]


@pytest.fixture
def tables(tmp_path, monkeypatch, capsys):
    """The program, called with words, on these records; what it prints, or its error."""
    monkeypatch.setattr(cells, "cells_of", get)  # tests/test_cells.py has those of real results

    def run(*words, records=(), code=0):
        for one in records:
            put(tmp_path, one)
        argv = ["make_tables.py", *words, "--results", str(tmp_path)]
        if "--check" in words and "--write" not in words:
            argv += ["--write", str(ROOT / "LICENSE")]  # a page without tables
        monkeypatch.setattr(sys, "argv", argv)
        try:
            run_main(program.main, program.get_args_parser().parse_args(argv[1:]))
            assert code == 0
        except SystemExit as stopped:
            assert stopped.code == code, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if code else out

    return run


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


B, H = "vit_base_patch16", "vit_huge_patch14"
ENTROPY = "aggregation_entropy_block_mean"


def test_published_encoders_stand_beside_the_paper_and_absent_ones_are_dashes(tables, tmp_path):
    text = tables("--table", "3", records=[record("mae", B, ENTROPY, "cls", [5.05]),
                                           record("dino", B, ENTROPY, "cls", [4.6])])  # fmt: skip
    assert text == (
        "**Table 3: aggregation entropy (nats), mean over heads, images and blocks**\n"
        "\n"
        "| encoder | ViT | entropy | paper | difference |\n"
        "|---|---|---|---|---|\n"
        "| MAE | ViT-B/16 | 5.050 | 5.03 | +0.02 |\n"
        "| SimMIM | ViT-B/16 | – | 4.96 | – |\n"
        "| BEiT-v2 | ViT-B/16 | – | 4.89 | – |\n"
        "| I-JEPA | ViT-H/14 | – | 5.28 | – |\n"
        "| CAPI | ViT-L/14 | – | 5.28 | – |\n"
        "| DINO | ViT-B/16 | 4.600 | 4.70 | -0.10 |\n\n"
    )
    assert (tmp_path / "imagenet1k" / "table3.md").read_text() + "\n" == text


def test_models_without_cls_show_both_conventions(tables):
    text = tables("--table", "3", records=[record("ijepa", H, ENTROPY, "pos", [5.5451774])])
    assert row(text, "| I-JEPA") == "| I-JEPA | ViT-H/14 | 5.545 / 5.278 <sup>1</sup> | 5.28 | +0.27 / +0.00 |"
    assert "<sup>1</sup> ln of its own patches / ln 196, which the paper prints for all such encoders" in text


def test_what_was_measured_otherwise_is_marked_and_not_compared(tables):
    one = record("mae", B, "top1", "abmilp", [50.0, 51.0, 52.0], obstacles=["epochs 2, the paper's 90"])
    text = tables("--table", "7", records=[one])
    assert row(text, "| MAE | ViT-B") == (
        "| MAE | ViT-B/16 | 51.0 ± 1.0 <sup>1, 2</sup> | 71.6 | – | – | 71.4 | – | – | 75.4 | – |"
    )
    assert "<sup>1</sup> ± over 3 seeds; seeds vary initial weights only" in text
    assert "<sup>2</sup> not comparable: epochs 2, the paper's 90" in text


def test_encoders_that_the_paper_lacks_follow_with_its_dashes(tables):
    text = tables("--table", "3", records=[record("beitv2_300e", B, ENTROPY, "cls", [5.0])])
    assert row(text, "| beitv2_300e").endswith("| 5.000 <sup>1</sup> | – | – |")
    assert "not in the paper's table" in text and row(text, "| BEiT-v2 |").endswith("| – | 4.89 | – |")


def test_values_of_the_papers_other_tables_say_where_they_stand(tables):
    text = tables("--table", "1", records=[record("beitv2", B, "top1", "cls", [78.0, 79.0, 80.0])])
    assert row(text, "| BEiT-v2").startswith("| BEiT-v2 | ViT-B/16 | 79.0 ± 1.0 <sup>")
    assert "the paper's value: Figure 1 of v1, bar height measured (+-0.1)" in text
    assert row(text, "| MAE | ViT-B/16").startswith("| MAE | ViT-B/16 | – | 67.8 <sup>")


def test_fewer_seeds_and_changed_code_are_said(tables):
    text = tables("--table", "7", records=[record("mae", B, "top1", "ap1", [71.0], dirty=True)])
    assert "1 seed, the paper has 3" in text and "uncommitted changes" in text
    text = tables("--table", "7", records=[record("mae", B, "top1", "ap1", [71.0], dirty=None)])
    assert "made by code of an unknown commit" in text


def test_settings_in_which_cells_of_a_table_differ_are_notes(tables):
    """Where no protocol makes them obstacles; and the precision and the code everywhere."""
    mine = ("mae", "vit_demo_patch8", "top1")
    one = record(*mine, "cls", [40.0], "demo", final_norm=False, optimizer="lars")
    two = record(*mine, "abmilp", [40.0], "demo", final_norm=True, optimizer="sgd")
    two.result["commit"] = "abd"
    text = tables("--dataset", "demo", "--table", "1", records=[one, two])
    for note in ("optimizer lars, final_norm False, commit abc", "optimizer sgd, final_norm True, commit abd"):
        assert f"</sup> {note}" in text
    amps = {"cls": "float16", "abmilp": "float32"}
    text = tables("--table", "1", records=[record("mae", B, "top1", head, [70.0], amp=amps[head]) for head in amps])
    assert "</sup> amp float16  \n" in text and "</sup> amp float32  \n" in text


@pytest.mark.parametrize("varied", [None, ["weights", "order", "views"]])
def test_what_the_seeds_vary_stands_under_the_numbers(tables, varied):
    settings = {"seeds_vary": varied} if varied else {}
    text = tables("--table", "7", records=[record("mae", B, "top1", "ap1", [71.0, 71.2, 71.4], **settings)])
    everything = "± over 3 seeds; seeds vary initial weights, data order and augmentation"
    assert (everything in text) == bool(varied) and ("initial weights only" in text) != bool(varied)


def test_activations_and_rules_are_rows(tables):
    text = tables("--table", "5", records=[record("mae", B, "top1", "abmilp-d3-tanh", [66.0, 66.5, 67.0])])
    assert row(text, "| MAE | ViT-B/16 | tanh") == (
        "| MAE | ViT-B/16 | tanh |  |  |  | – | 68.7 | – | 66.5 ± 0.5 <sup>1</sup> | 66.7 | -0.2 | – | 66.7 | – |"
    )
    text = tables("--table", "6", records=[record("mae", B, "aggregation_entropy", "abmilp", [4.8, 4.82, 4.84])])
    assert row(text, "| MAE | ViT-B/16 | AbMILP").endswith("| – | 71.6 | – | 4.82 ± 0.02 <sup>1</sup> | 4.80 | +0.02 |")


def test_demo_has_tables_of_its_own_without_the_papers_values(tables, tmp_path):
    mine = [record("mae", "vit_demo_patch8", "top1", head, [40.0, 42.0], "demo") for head in ("cls", "abmilp")]
    mine.append(record("mae", "vit_demo_patch8", "top1", "abmilp", [30.0], "demo_few"))
    text = tables("--dataset", "demo", "--table", "1", records=mine)
    assert "| MAE | ViT-demo/8 | 41.0 ± 1.4 | – | 41.0 ± 1.4 |" in text and "paper" not in text
    assert "10 test images of demo (01234567)" in text
    text = tables("--dataset", "demo", "--table", "2")
    own = "41.0 ± 1.4 <sup>1, 2, 3</sup>"
    assert f"| MAE | ViT-demo/8 | {own} | {own} | – | 30.0 <sup>4, 5</sup> |" in text
    (tmp_path / "imagenet1k").mkdir()
    assert "41.0" not in tables("--table", "1")


# ---- the check


@pytest.fixture
def kept(tables, tmp_path):
    """Records of the demo with their tables."""
    heads = ("cls", "pos", "abmilp")
    records = [record("mae", "vit_demo_patch8", "top1", head, [40.0, 41.0], "demo") for head in heads]
    tables("--dataset", "demo", records=records)
    tables("--check")
    return tmp_path


def test_removed_record_empties_its_cell_alone_and_fails_the_check(tables, kept):
    before = (kept / "demo" / "table1.md").read_text()
    (kept / "demo" / "mae.vit_demo_patch8.top1.pos.json").unlink()
    error = tables("--check", code=2)
    assert str(kept / "demo" / "table1.md") in error and "table2" not in error and error.count("\n") == 1
    tables("--dataset", "demo")
    tables("--check")
    after = (kept / "demo" / "table1.md").read_text()
    assert before.replace("| 40.5 ± 0.7 | 40.5 ± 0.7 | 40.5 ± 0.7 |", "| 40.5 ± 0.7 | – | 40.5 ± 0.7 |") == after


@pytest.mark.parametrize("name", ["table1.md", "table2.md", "figure1.md"])
def test_edited_and_missing_tables_fail_the_check(tables, kept, name):
    path = kept / "demo" / name
    path.write_text(path.read_text().replace("40.5", "99.9"))
    assert str(path) in tables("--check", code=2)
    path.unlink()
    assert str(path) in tables("--check", code=2)


def test_table_of_a_page_is_kept_and_checked(tables, kept, tmp_path):
    page, marks = tmp_path / "page.md", "python scripts/make_tables.py --table 1 --dataset demo --write"
    page.write_text(f"a\n<!-- table1 of demo: {marks} page.md -->\n<!-- end of table1 of demo -->\nb\n")
    assert "table1 of demo in" in tables("--check", "--write", str(page), code=2)
    tables("--table", "1", "--dataset", "demo", "--write", str(page))
    tables("--check", "--write", str(page))
    assert "| MAE | ViT-demo/8 | 40.5 ± 0.7 |" in page.read_text()


@pytest.mark.parametrize("name", ["imagenet/table1.md", "demo/table9.md", "demo_few/figure2.md"])
def test_table_that_has_no_records_fails_the_check(tables, kept, name):
    (kept / name).parent.mkdir(exist_ok=True)
    (kept / name).write_text("| MAE | 71.6 |\n")
    assert f"not what the records say: {kept / name}" in tables("--check", code=2)


def test_table_that_is_no_text_fails_the_check_with_its_name(tables, kept):
    path = kept / "demo" / "table1.md"
    path.write_bytes(path.read_text().encode("utf-16"))
    assert str(path) in tables("--check", code=2)
    (kept / "page.md").write_bytes(b"\xff")
    for name in ("page.md", "none.md"):
        assert f"{kept / name} cannot be read" in tables("--check", "--write", str(kept / name), code=2)


def test_folder_that_is_not_there_fails_the_check(tables, tmp_path):
    tmp_path.rename(tmp_path.with_name("gone"))
    assert f"--results {tmp_path} does not exist" in tables("--check", code=2)


def test_mark_of_a_table_that_there_is_not_fails_the_check(tables, kept):
    for mark in ("table4 of demo", "table1 of nowhere"):
        (kept / "page.md").write_text(f"<!-- {mark}: python page.md -->\n")
        (kept / "demo" / "table1.md").touch()
        assert f"{mark} in" in tables("--check", "--write", str(kept / "page.md"), code=2)


def test_committed_tables_and_records_pass_the_check():
    program.check(ROOT / "results", program.PAGES)


def test_check_refuses_a_page_that_shows_a_record_of_changed_code(tables, kept, monkeypatch):
    monkeypatch.setattr(shown, "ROOT", kept)
    record = kept / "results" / "tiny" / "MAE.results.json"
    record.parent.mkdir(parents=True)
    page = kept / "page.md"
    page.write_text("[records](results/tiny)\n")
    for dirty in (True, False):
        record.write_text(json.dumps({"commit": "abc", "dirty": dirty, "args": {"dataset": "tiny_imagenet"}}))
        text = tables("--check", "--write", str(page), code=2 * dirty)
        assert (f"{record} was made by code with uncommitted changes" in text) == dirty


def test_check_compares_short_runs_with_goldens(tables, kept):
    golden = kept / "quickstart" / "short" / "MAE.results.json"
    golden.parent.mkdir(parents=True)
    golden.write_text(json.dumps({**dict.fromkeys(shown.ORIGIN), "numbers": {"probes/cls/last/top1": 41.0}}))
    computed = kept / "runs" / "MAE" / "results.json"
    computed.parent.mkdir(parents=True)
    for top1, code in ((41.0, 0), (50.0, 2)):
        computed.write_text(json.dumps({"probes": {"cls": {"last": {"top1": top1}}}}))
        text = tables("--check", "--computed", str(kept / "runs"), "--write", str(ROOT / "LICENSE"), code=code)
    assert "probes/cls/last/top1 is 50, was 41" in text


def test_mistakes_are_one_line(tables):
    assert "has no records" in tables(code=2)
    assert "choose one of" in tables("--dataset", "image_folder", code=2)
    assert "--output and --write are for one table" in tables("--table", "1", "2", "--output", "x", code=2)
    one = record("mae", B, "top1", "ap1", [71.0])
    assert "cannot be written" in tables("--table", "7", "--output", "/proc/nowhere/t.md", records=[one], code=2)


def test_every_value_of_the_papers_tables_has_a_cell():
    paper = [one for one in json.loads(program.PAPER.read_text()) if one["table"] in {*TABLES} - {"1"}]
    for one in paper:
        rows = program.rows_of(one["table"], "imagenet1k", {}, paper)
        cell = Cell(*(one[field] for field in Cell._fields))
        found = [entry.paper for line in rows for entry in line.entries if entry and entry.cell == cell]
        assert found == [one["value"]], one
    assert table_of("2", "demo").encoders == []


def test_every_table_has_values_of_the_paper():
    known = {one["table"] for one in json.loads(program.PAPER.read_text())} - {"ref", "C.2"}
    known.add("2")  # of which none is known
    if missing := [name for name in TABLES if name not in known]:
        pytest.fail(f"results/paper_numbers.json has no value of table {', '.join(missing)}: add what the paper prints "
                    "there", pytrace=False)  # fmt: skip
    assert known == set(TABLES)


# ---- figures and pages of the same numbers


def test_bars_that_cannot_be_compared_are_hatched():
    records = [record("mae", B, "top1", "cls", [68.0]), record("mae", B, "top1", "abmilp", [61.0], obstacles=["odd"])]
    rows = rows_of("fig1", "imagenet1k", {one.cell: one for one in records}, json.loads(program.PAPER.read_text()))
    figure = plot_bars.draw(rows, table_of("fig1", "imagenet1k").columns)
    assert [bar.get_height() for bar in figure.axes[0].patches if bar.get_hatch()] == [61.0]
    assert "not comparable with the paper" in [text.get_text() for text in figure.legends[0].texts]
    plain = plot_bars.draw(rows[:0], table_of("fig1", "imagenet1k").columns)
    assert not any(bar.get_hatch() for bar in plain.axes[0].patches)


def test_boxes_of_the_readme_are_those_of_the_records():
    scores = json.loads((ROOT / "results" / "aggregation" / "demo.aggregation.json").read_text())["over_seeds"]
    readme = (ROOT / "README.md").read_text()
    assert f"{scores['attn-mn']['maxboxaccv2']['mean']:.1f} for MAE's [cls]" in readme
    abmilp = scores["abmilp"]["maxboxaccv2"]
    assert f"{abmilp['mean']:.1f} ± {abmilp['std']:.1f} for AbMILP" in readme
