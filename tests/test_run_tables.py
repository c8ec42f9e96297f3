"""Tables of single runs: means over the right probes, and a note or a refusal wherever runs are not alike."""

import json

import pytest

from paper.runs import rules_table, runs_table
from probing.finished_run import read_run
from scripts import make_tables

ARGS = {"epochs": 2, "optimizer": ["lars"], "blr": [30.0], "amp": "float32", "crop": "mae", "final_norm": False}


@pytest.fixture
def run(tmp_path):
    """Writes a results.json of {head: top-1 of each seed}, at the rates of `settings`; returns its path."""

    def write(name, scores, seeds=(0, 1), settings=({},), args=(), **changes):
        probes = {}
        for number, setting in enumerate(settings):
            for head, values in scores.items():
                for seed, top1 in zip(seeds, values, strict=True):
                    last = {"epoch": 1, "top1": top1 if top1 is None else top1 + number, "map": 5.0, "n": 10}
                    probes[f"{head}/{number}/seed{seed}"] = {
                        "head": head, "block": 5, "blr": 30.0, "lr": None, "seed": seed, "optimizer": "lars",
                        "parameters": 9, "diverged_at": None, "last": last, **setting,
                    }  # fmt: skip
        result = {
            "probes": probes, "args": {**ARGS, **dict(args)}, "encoder": {"model": "vit", "source": "a"}, "n_val": 0,
            "n_train": 20, "n_test": 10, "headline": "top1", "test_images": "f" * 64, "train_images": "a" * 64,
            "effective_batch": 10, "bn_group": 10, "versions": {"torch": "2"}, "commit": "abc", **changes,
        }  # fmt: skip
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps(result))
        return tmp_path / name

    return write


def test_mean_and_deviation_are_over_the_seeds_of_a_head(run):
    path = run("a", {"cls": (10.0, 12.0), "abmilp": (50.0, 52.0)})
    text = runs_table([f"mine={path}"])
    assert "| encoder | cls | abmilp |" in text and "| mine | 11.0 ± 1.4 | 51.0 ± 1.4 |" in text
    assert "top-1 (%), last epoch, mean ± std over 2 seeds; 20 training and 10 test images, 2 epochs  \n" in text
    assert "seeds vary initial weights only" in text and "differ" not in text


def test_single_seed_has_no_deviation_and_a_missing_head_is_a_dash(run):
    text = runs_table([f"a={run('a', {'cls': (10.0,)}, seeds=(0,))}", f"b={run('b', {'pos': (20.0,)}, seeds=(0,))}"])
    assert "| a | 10.0 | – |\n| b | – | 20.0 |" in text and "±" not in text and "seeds" not in text


def test_settings_are_rows_or_those_that_held_out_images_chose(run):
    path = run("a", {"cls": (1.0, 3.0)}, settings=[{"block": 0, "blr": 0.1}, {"block": 0, "blr": 2.0}, {"block": 5}])
    text = runs_table([f"a={path}"])
    rows = [line for line in text.splitlines() if line.startswith("| a")]
    assert rows == [
        "| a, block 0, blr 0.1 | 2.0 ± 1.4 |",
        "| a, block 0, blr 2 | 3.0 ± 1.4 |",
        "| a, block 5, blr 30 | 4.0 ± 1.4 |",
    ]
    chosen = [{"blr": rate, "chosen": rate == 2.0, "val": {}} for rate in (0.1, 2.0)]
    text = runs_table([f"a={run('b', {'cls': (1.0, 3.0)}, settings=chosen, n_val=5)}"])
    assert "| a | 3.0 ± 1.4 |" in text and "rates chosen on 5 held-out images" in text


def test_runs_that_are_not_alike_say_so(run):
    one = run("a", {"cls": (10.0, 12.0)})
    two = run("b", {"cls": (20.0, 22.0)}, args={"epochs": 3, "blr": [1.0]}, n_train=7, commit="abd")
    text = runs_table([f"a={one}", f"b={two}"])
    assert "7 or 20 training and 10 test images, 2 or 3 epochs" in text
    assert "runs differ in blr: [30.0] (a), [1.0] (b)" in text and "runs differ in commit: abc (a), abd (b)" in text


@pytest.mark.parametrize(
    ("label", "changes", "message"),
    [
        ("a", {}, r"a/results.json and .*b/results.json are both called a"),
        ("b", {"test_images": "e" * 64}, "have different test images"),
        ("b", {"headline": "map"}, "have different scores"),
    ],
)
def test_runs_that_cannot_share_a_table_are_refused(run, label, changes, message):
    scores = {"cls": (10.0, 12.0)}
    with pytest.raises(ValueError, match=message):
        runs_table([f"a={run('a', scores)}", f"{label}={run('b', scores, **changes)}"])


@pytest.mark.parametrize(
    ("scores", "settings"),
    [({"cls": (10.0, None)}, [{}]), ({"cls": (10.0, 12.0)}, [{"diverged_at": {"epoch": 1, "step": 2}}])],
)
def test_diverged_probes_have_no_mean(run, scores, settings):
    assert "| a | diverged |" in runs_table([f"a={run('a', scores, settings=settings)}"])


def test_a_table_draws_no_conclusion_from_probes_that_learned_nothing(run):
    text = runs_table([f"a={run('a', {'cls': (10.0,)}, seeds=(0,), settings=[{'learned_nothing': 'its loss'}])}"])
    assert "no better than guessing, so no conclusion (learned_nothing in results.json): cls" in text


def test_images_that_could_not_be_read_are_counted(run):
    text = runs_table([str(run("a", {"cls": (10.0, 12.0)}, n_test=12))])
    assert "measured on 10 of 12 test images" in text


@pytest.mark.parametrize("seeds_vary", [None, ["weights", "order", "views"]])
def test_table_says_what_the_seeds_vary(run, seeds_vary):
    text = runs_table([str(run("a", {"cls": (10.0, 12.0)}, seeds_vary=seeds_vary))])
    assert ("initial weights, data order and augmentation" in text) == (seeds_vary is not None)


def test_unfinished_or_unreadable_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"results.json cannot be read: No such file"):
        runs_table([str(tmp_path)])
    for content in ("{", "[]", "{}"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=r"results.json is not a results.json of main_linprobe.py"):
            runs_table([str(tmp_path)])


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("probes/cls~0~seed0/head", None), ("probes/cls~0~seed0/block", 10**30), ("probes/cls~0~seed0/last/top1", "x"),
        ("probes/cls~0~seed0/diverged_at", ...), ("probes", {}), ("args/epochs", []), ("seeds_vary", ["x"]),
        ("n_test", True), ("versions", ...),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [runs_table, lambda paths: read_run(*paths)])
def test_a_record_with_a_value_missing_or_of_another_kind_is_named(read, place, wrong, run):
    path = run("a", {"cls": (10.0, 12.0)}) / "results.json"
    content = node = json.loads(path.read_text())
    *above, last = (name.replace("~", "/") for name in place.split("/"))
    for name in above:
        node = node[name]
    node.pop(last) if wrong is ... else node.update({last: wrong})
    path.write_text(json.dumps(content))
    path.with_name("args.json").write_text('{"args": {}}')
    with pytest.raises(ValueError, match=r"a/results.json is not a results.json of main_linprobe.py: it"):
        read([str(path.parent)])


def test_rules_are_rows_with_their_scores_over_seeds(tmp_path):
    path = tmp_path / "aggregation.json"
    score = {"mean": 58.73, "n": 3, "std": 0.66}
    scores = {"top1": score, "aggregation_entropy": {**score, "mean": 1.64, "std": 0.118}, "maxboxaccv2": score}
    fixed = {"aggregation_entropy": {"mean": 4.04, "n": 1, "std": None}}
    path.write_text(json.dumps({"over_seeds": {"abmilp": scores, "attn-mn": fixed}, "probes": {}}))
    text = rules_table(path)
    assert "| mean [cls] attention | – | 4.04 | – |\n| AbMILP | 58.7 ± 0.7 | 1.64 ± 0.12 | 58.7 ± 0.7 |" in text
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"{path} is not an aggregation.json"):
        rules_table(path)


def test_table_of_a_page_is_written_between_its_marks_and_checked(run, tmp_path, capsys):
    results, page = run("a", {"cls": (10.0, 12.0)}) / "results.json", tmp_path / "page.md"
    mark = f"<!-- runs: python scripts/make_tables.py --runs mine={results} --write page.md -->"
    page.write_text(f"{mark}\nold\n<!-- end of runs -->\n")
    assert make_tables.stale_in_page(page, tmp_path) == [f"runs in {page}"]
    make_tables.main(make_tables.get_args_parser().parse_args(["--runs", f"mine={results}", "--write", str(page)]))
    assert page.read_text() == f"{mark}\n{capsys.readouterr().out[:-1]}<!-- end of runs -->\n"
    assert make_tables.stale_in_page(page, tmp_path) == []
    page.write_text(page.read_text().replace("11.0", "71.6"))
    assert make_tables.stale_in_page(page, tmp_path) == [f"runs in {page}"]
