"""scripts/compare_rules.py: shares of the gap by hand; scripts/plot_scaling.py: which heads a line joins."""

import json

import numpy as np
import pytest

from cli.console import parse
from scripts import compare_rules, plot_scaling
from util.intervals import student

POS, BEST, FAR = [30.0, 31.0, 29.0], [60.0, 62.0, 61.0], [45.0, 40.0, 53.0]


def scored(head, seed, top1):
    return f"{head}/block5/blr1.0/seed{seed}", {"top1": top1}


@pytest.fixture
def analysis(tmp_path):
    rules = []
    for name, values in (("pos", POS), ("far", FAR)):
        scores = dict(scored(name, seed, value) for seed, value in enumerate(values))
        rules.append({"name": name, "head": name, "block": 5, "seed": None, "scores": scores})
    for seed, value in enumerate(BEST):
        name, scores = f"abmilp/seed{seed}", [scored("abmilp", seed, value)]
        rules.append({"name": name, "head": "abmilp", "block": 5, "seed": seed, "scores": dict(scores)})
    rules.append({"name": "attn-mn", "head": "attn-mn", "block": 5, "seed": None, "scores": {}})
    maps = {rule["name"]: {"maxboxaccv2": 10.0 + number} for number, rule in enumerate(rules)}
    (tmp_path / "aggregation.json").write_text(json.dumps({"rules": rules, "localization": {"maps": maps}}))
    return tmp_path


def write_again(folder, change):
    result = json.loads((folder / "aggregation.json").read_text())
    change(result)
    (folder / "aggregation.json").write_text(json.dumps(result))


def test_shares_of_the_gap_are_paired_by_seed(analysis, capsys):
    rows = compare_rules.judged(analysis)
    assert list(rows) == ["abmilp", "far", "pos", "attn-mn"]
    pos, best, far = map(np.array, (POS, BEST, FAR))
    shares = 100 * (far - pos) / (best - pos)
    assert rows["far"]["closed"] == {"mean": pytest.approx(shares.mean()), "interval": student(shares)}
    assert rows["pos"]["closed"]["mean"] == 0 and rows["abmilp"]["closed"]["mean"] == 100
    assert rows["abmilp"]["maxboxaccv2"]["mean"] == 13 and rows["attn-mn"]["top1"] is None
    target = analysis / "rules.json"
    argv = [f"MAE={analysis}", "--output", str(target)]
    compare_rules.main(parse(compare_rules.get_args_parser(), argv))
    assert (
        f"| MAE | far | 3 | 46.0 ({student(far)}) | {shares.mean():.1f} ({student(shares)}) |"
        in capsys.readouterr().out
    )
    assert json.loads(target.read_text())["MAE"]["far"]["closed"]["mean"] == pytest.approx(shares.mean())


def test_no_share_of_a_gap_that_may_be_none(analysis):
    def close(result):
        for rule, value in zip(result["rules"][2:5], (33.0, 29.0, 30.0), strict=True):
            next(iter(rule["scores"].values()))["top1"] = value

    write_again(analysis, close)
    assert all(row["closed"] is None for row in compare_rules.judged(analysis).values())


def test_mistakes_are_one_line(analysis, tmp_path):
    write_again(analysis, lambda result: result["rules"].pop(0))
    with pytest.raises(ValueError, match="has no probes of pos"):
        compare_rules.judged(analysis)
    write_again(analysis, lambda r: r["rules"][0]["scores"].update([("far/block5/blr2.0/seed0", {"top1": 1.0})]))
    with pytest.raises(ValueError, match="far has several rates per seed"):
        compare_rules.judged(analysis)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not an aggregation\.json"):
        compare_rules.judged(tmp_path / "other.json")


@pytest.mark.usefixtures("rendered")
def test_lines_join_heads_that_differ_in_width_or_depth_alone(tmp_path, capsys):
    heads = [
        "abmilp", "abmilp:branches=2", "abmilp:branches=4", "abmilp:depth=2", "abmilp:depth=3",
        "abmilp:depth=3,branches=2", "ep8", "ep32", "ep8:depth=2", "ap12", "cls", "cls+pos",
    ]  # fmt: skip
    probes = {
        f"{head}/block5/blr1.0/seed{seed}": {
            "head": head, "block": 5, "seed": seed, "parameters": 100 * (number + 1), "diverged_at": None,
            "last": {"epoch": 0, "top1": 10.0 * number + seed}, "optimizer": "lars", "blr": 1.0,
        }
        for number, head in enumerate(heads) for seed in (0, 1)
    }  # fmt: skip
    facts = {"headline": "top1", "args": {"epochs": 1}, "encoder": {}, "versions": {}, "commit": "", "test_images": "x"}
    facts |= {"n_train": 9, "n_val": 0, "n_test": 9}
    (tmp_path / "results.json").write_text(json.dumps({**facts, "probes": probes}))
    (points,) = map(plot_scaling.points_of, plot_scaling.read_runs([str(tmp_path)]).values())
    assert points[1] == ("abmilp:branches=2", 5, 200, 10.5, pytest.approx(0.5**0.5))
    lines = {name: [point.head for point in line] for name, line in plot_scaling.lines_of(points).items()}
    assert lines == {
        "abmilp: branches": ["abmilp", "abmilp:branches=2", "abmilp:branches=4"],
        "abmilp: depth": ["abmilp", "abmilp:depth=2", "abmilp:depth=3"],
        "abmilp, depth 3: branches": ["abmilp:depth=3", "abmilp:depth=3,branches=2"],
        "abmilp, branches 2: depth": ["abmilp:branches=2", "abmilp:depth=3,branches=2"],
        "ep: queries": ["ep8", "ep32"],
        "ep, queries 8: depth": ["ep8", "ep8:depth=2"],
    }
    argv = [f"MAE={tmp_path}", "--output", str(tmp_path / "scaling.png")]
    plot_scaling.main(parse(plot_scaling.get_args_parser(), argv))
    assert "| MAE | abmilp:branches=2 | 5 | 200 | 10.50 ± 0.71 |" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
