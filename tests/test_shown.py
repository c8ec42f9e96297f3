"""Records that pages show are of clean, known code, and CI's short runs repeat their goldens."""

import json

import pytest

from paper import shown


def result(top1=41.0, mean=4.0, **changes):
    probe = {"last": {"top1": top1, "loss": 1.6, "n": 100}, "parameters": 7}
    metric = {"blocks": [{"block": 0, "mean": mean, "std": 0.1, "mean_per_head": [1.0]}], "uniform": {"value": 0.1}}
    return {
        "probes": {"cls/seed0": probe}, "metrics": {"entropy": metric}, "seconds": 9.0, "args": {"dataset": "demo"},
        "commit": "a" * 40, "dirty": False, "versions": {}, "command": "main.py", **changes,
    }  # fmt: skip


@pytest.fixture
def record(tmp_path):
    """Writes a record and its golden, and lists what is wrong with them."""

    def problems(content, golden=None):
        path = tmp_path / "MAE.results.json"
        path.write_text(json.dumps(content))
        (tmp_path / "short").mkdir(exist_ok=True)
        if golden is not None:
            (tmp_path / "short" / path.name).write_text(json.dumps(shown.golden_of(golden)))
        return shown.origin_problems(path, content)

    return problems


def test_clean_record_with_its_golden_is_accepted(record):
    assert record(result(), result()) == []


@pytest.mark.parametrize(
    ("content", "golden", "text"),
    [
        (result(dirty=True), result(), "MAE.results.json was made by code with uncommitted changes"),
        (result(dirty=None), result(), "MAE.results.json was made by code of no commit"),
        (result(), result(dirty=True), "short/MAE.results.json was made by code with uncommitted changes"),
        (result(), None, "has no golden"),
        (result(commit="0" * 40), result(), "were made at different commits"),
    ],
)
def test_record_of_unclean_code_or_without_golden_is_refused(record, content, golden, text):
    assert any(text in problem for problem in record(content, golden))


def test_records_of_other_data_sets_need_no_golden(record):
    assert record(result(args={"dataset": "tiny_imagenet"})) == []


def test_pages_show_the_records_that_they_link_or_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(shown, "ROOT", tmp_path)
    names = ("quickstart/MAE.results.json", "real/a.json", "real/short/a.json", "real/not_shown/b.json", "paper.json")
    for name in names:
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text(json.dumps(result() if name != "paper.json" else [1]))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- runs: python x MAE=results/quickstart/MAE.results.json --write page.md -->\n"
                    "[all](../results/real) and [values](../results/paper.json)\n")  # fmt: skip
    found = [str(path.relative_to(tmp_path / "results")) for path in shown.shown_records(page)]
    assert found == ["quickstart/MAE.results.json", "real/a.json", "real/not_shown/b.json"]


# ---- goldens


def test_golden_keeps_what_was_measured():
    assert shown.golden_of(result())["numbers"] == {
        "probes/cls/seed0/last/top1": 41.0, "probes/cls/seed0/last/loss": 1.6, "metrics/entropy/blocks/0/mean": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("computed", "texts"),
    [
        (result(top1=44.0, mean=4.0003), []),  # other CPUs
        (result(top1=44.5), ["top1 is 44.5, was 41"]),
        (result(mean=4.001), ["mean is 4.001, was 4"]),
        (result(mean=float("nan")), ["mean is nan, was 4"]),
        (result(metrics={}), ["mean is not computed any more"]),
        (result(metrics={**result()["metrics"], "new": {"blocks": [{"mean": 1.0}]}}), []),
    ],
)
def test_numbers_that_changed_are_named(computed, texts):
    found = shown.differences(shown.golden_of(result()), computed)
    assert len(found) == len(texts) and all(text in line for text, line in zip(texts, found, strict=True))


def test_short_runs_are_compared_with_every_golden(tmp_path):
    results, runs = tmp_path / "results", tmp_path / "runs"
    golden = results / "quickstart" / "short" / "MAE.attention.json"
    golden.parent.mkdir(parents=True)
    golden.write_text(json.dumps(shown.golden_of(result())))
    with pytest.raises(ValueError, match=r"must have one MAE/attention.json .* has 0"):
        shown.golden_problems(results, runs)
    computed = runs / "attention" / "MAE" / "attention.json"
    computed.parent.mkdir(parents=True)
    computed.write_text(json.dumps(result()))
    assert shown.golden_problems(results, runs) == []
    computed.write_text(json.dumps(result(mean=5.0)))
    (problem,) = shown.golden_problems(results, runs)
    assert f"{computed} differs from {golden}: metrics/entropy/blocks/0/mean is 5, was 4" in problem
    golden.write_text("{}")
    with pytest.raises(ValueError, match=f"{golden} is not a golden"):
        shown.golden_problems(results, runs)


def test_records_are_remade_with_their_goldens(tmp_path):
    for folder, value in (("full", 41.2345678), ("short", 11.0)):
        path = tmp_path / folder / "probes" / "MAE" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result(top1=value, found=[0] * 9)))
    record = tmp_path / "results" / "quickstart" / "MAE.results.json"
    shown.remake(tmp_path / "results", tmp_path / "full", tmp_path / "short")
    content = json.loads(record.read_text())
    assert content["probes"]["cls/seed0"]["last"]["top1"] == 41.2346 and "found" not in content
    assert shown.read_golden(record.parent / "short" / record.name)["numbers"]["probes/cls/seed0/last/top1"] == 11.0
