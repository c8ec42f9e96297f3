"""The report: complete, valid and self-contained HTML that says what the records say, whatever these hold."""

import base64
import hashlib
import json
import os
import re
import runpy
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from report.attention import aggregation_result
from report.facts import state
from report.html import NONE, VOID, Html, element, filled, number, table
from report.runs import find_runs
from report.sections import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "scripts" / "make_report.py")
KINDS = {program: section.kind for program, section in SECTIONS.items()}
EVIL = "<script>alert(1)</script>&\"'"
ENCODER = {"model": "vit_base_patch16", "source": "mae.pth", "family": "mae", "sha256": "5" * 64}
MADE = {"command": "program --flags", "commit": "c0ffee", "dirty": False, "versions": {"torch": "2.11"}, "device": "H",
        "processes": 1, "threads": 2}  # fmt: skip


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, (0, 0))


def scores(top1, epoch=1):
    return {"epoch": epoch, "top1": top1, "per_class": top1, "loss": 1.25, "n": 500}


def bank(heads=("cls", "abmilp"), held_out=False, **others):
    """results.json: two seeds of each head, top-1 of 40 and 42 and of 50 and 52 %."""
    probes = {}
    for place, head in enumerate(heads):
        for seed in (0, 1):
            top1 = 40.0 + 10 * place + 2 * seed
            probes[f"{head}/block11/blr0.1/seed{seed}"] = {
                "aggregation": head, "head": head, "block": 11, "blr": 0.1, "lr": None, "seed": seed,
                "optimizer": "lars", "parameters": 769_000, "diverged_at": None, "last": scores(top1),
                **({"val": {"last": scores(7), "best": scores(8)}, "chosen": place == 0} if held_out
                   else {"best": scores(top1 + 1, epoch=0)}),
            }  # fmt: skip
    args = {"cls_features": list(heads), "epochs": 2, "dataset": "image_folder", "data_path": "images", "blr": [0.1]}
    return {"probes": probes, "seconds": 4000.0, "args": args, "encoder": ENCODER, "n_train": 1000, "n_val": 0,
            "n_test": 500, "classes": 10, "headline": "top1", "test_images": "f" * 64,
            "lr": dict.fromkeys(probes, 0.1), **MADE, **others}  # fmt: skip


def log_of(results, epochs=2):
    names = list(results["probes"])
    records = [{"epoch": epoch, "train_loss": [2.0 - 0.5 * epoch] * len(names),
                "test": {name: scores(30.0 + epoch) for name in names}} for epoch in range(epochs)]  # fmt: skip
    return "".join(f"{json.dumps(record)}\n" for record in records)


def put_bank(folder, **options):
    results = bank(**options)
    put(folder / "results.json", results)
    put(folder / "args.json", {name: value for name, value in results.items() if name not in ("probes", "seconds")})
    put(folder / "log.txt", log_of(results))


def attention(label, images=500, source="mae.pth"):
    blocks = [{"block": b, "count": images, "mean": 4.0 + b / 8, "std": 0.1, "mean_per_head": [4.0, 4.1],
               "std_per_head": [0.1, 0.1]} for b in range(2)]  # fmt: skip
    metric = {"unit": "nats", "definition": "H(a'_0)", "source": "Fig. 4", "axis": "head", "blocks": blocks,
              "lower": None, "upper": None, "uniform": {"name": "ln M", "value": 5.278}}  # fmt: skip
    return {"label": label, "encoder": {**ENCODER, "source": source}, "random_weights": source is None,
            "images": images, "input_size": 224, "patches": 196, "tokens": 197, "registers": 0,
            "metrics": {"cls_patch_entropy": metric}, "seconds": 30.0, **MADE}  # fmt: skip


def put_attention(folder, *labels, asked=None, **options):
    args = {"reduction": "auto", "dataset": "image_folder", "data_path": "images", "label": list(labels)}
    put(folder / "args.json", {"args": args, "encoders": [ENCODER] * (asked or len(labels)), **MADE})
    for place, label in enumerate(labels):
        put(folder / f"encoder{place}" / "attention.json", attention(label, **options))


def aggregation():
    rules = [{"name": name, "head": name, "block": 11, "probe": None, "seed": None, "notes": ["a note"], "scores": {},
              "entropy": {"mean": 3.25, "std": 0.5}} for name in ("attn-mn", "pos")]  # fmt: skip
    part = {"iou": 0.5, "max": 61.5, "threshold": 0.2}
    maps = {name: {"maxboxaccv2": 64.25, "maxboxacc": 71.75, "boxaccv2": [part]} for name in ("attn-mn", "pos")}
    kl = {"unit": "nats", "definition": "KL(row || column)", "mean": [[0.0, 0.625], [None, 0.0]]}
    return {"rules": rules, "images": 500, "patches": 196, "uniform_entropy": 5.278, "encoder": ENCODER,
            "random_weights": False, "input_size": 224, "seconds": 5.0, "oracle": None,
            "matrices": {"kl": kl, "kl_exact": {**kl, "infinite": [[0, 3], [0, 0]]}},
            "localization": {"images": 480, "boxes": "boxes.csv", "ious": [0.5], "maps": maps,
                             "whole_image": {"maxboxaccv2": 33.5, "boxaccv2": [33.5]}},
            "over_seeds": {"attn-mn": {"aggregation_entropy": {"mean": 3.25, "std": None, "n": 1}}},
            "args": {"kl_direction": "row_col", "dataset": "image_folder", "data_path": "images"}, **MADE}  # fmt: skip


def put_training(folder, program, epochs=2, ended=True):
    tuning = program == "finetune"
    args = {"epochs": 2, "data_path": "images", "dataset": "image_folder", "model": "vit_base_patch16",
            **({"layer_decay": 0.65} if tuning else {"mask_ratio": 0.75})}  # fmt: skip
    run = {"args": args, "lr": 1e-3, **({"encoder": ENCODER} if tuning else {}), **MADE}
    records = [{"epoch": epoch, "loss": 0.875 - epoch / 4, "lr": 1e-3, "images_per_second": 100.0,
                **({"test": scores(60.5 + epoch)} if tuning else {})} for epoch in range(epochs)]  # fmt: skip
    put(folder / "args.json", run)
    put(folder / "log.txt", "".join(f"{json.dumps(record)}\n" for record in records))
    if ended and tuning:
        put(folder / "results.json", {"last": records[-1], "seconds": 60.0, **run})
    elif ended:
        put(folder / "encoder.safetensors", "no tensors")


def put_picture(path, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


class Page(HTMLParser):
    """Reads a page, and insists on its validity."""

    def __init__(self, text):
        super().__init__()
        self.raw, self.open, self.tags, self.words, self.ids = text, [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def build(target, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_report.py", "--output", *map(str, (target, *words))])
        runpy.run_path(SCRIPT, run_name="__main__")
    return Page(target.read_text())


@pytest.fixture
def make(tmp_path, capsys):
    """The page of runs, or, where an error is expected, what is said."""

    def run(*words, code=0):
        if code == 0:
            return build(tmp_path / "report.html", *words)
        with pytest.raises(SystemExit) as stopped:
            build(tmp_path / "report.html", *words)
        assert stopped.value.code == code
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    put_bank(folder / "probes")
    put_attention(folder / "attention", "MAE", EVIL)
    put(folder / "aggregation" / "aggregation.json", aggregation())
    put_picture(folder / "aggregation" / "maps.png")
    put_training(folder / "tuned", "finetune")
    put_training(folder / "pretrained", "pretrain")
    put_picture(folder / "pretrained" / "reconstruction.png")
    put_picture(folder / "figure.png")
    return folder


@pytest.fixture(scope="module")
def everything(all_runs):
    return build(all_runs / "report.html", all_runs)


# ---------------------------------------------------------------------------------------------------------------------
# of all programs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_page_of_all_programs_is_valid_and_asks_for_nothing(everything):
    page = everything
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert links and set(links) <= set(page.ids)
    style = re.search(r"<style>(.*?)</style>", page.raw, re.S)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert "http" not in style + re.search(r"<script>(.*?)</script>", page.raw, re.S)[1]


def test_the_policy_of_the_page_names_its_own_script_and_style_alone(everything):
    page = everything
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.raw, re.S)
        seal = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{seal}'" in policy


def test_every_program_has_its_section_with_numbers_figures_and_provenance(everything):
    page = everything
    for title in ("Linear probes", "Attention flow", "Aggregation", "Fine-tuning", "Pretraining", "Figures"):
        assert title in page.text
    for said in ("5 runs; the newest record was written", "c0ffee", "torch 2.11", "f" * 64, "5" * 64, "program --flags",
                 "1 h 06 min", "1,000 training, 500 test images, 10 classes", "image_folder in images: 500 images",
                 "61.50", "64.25", "71.75", "33.50", "480 images", "3.250", "0.6250",
                 "encoder.safetensors cannot be"):  # fmt: skip
        assert said in page.text, said
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image["alt"] for image in images)
    assert {image["alt"] for image in images} >= {"maps.png", "reconstruction.png", "figure.png"}
    drawings = [base64.b64decode(i["src"].partition(",")[2]) for i in images if "svg" in i["src"]]
    assert len(drawings) > 8 and all(b"</svg>" in one for one in drawings)


def test_the_same_records_give_the_same_bytes(all_runs, make):
    assert make(all_runs / "probes").raw == make(all_runs / "probes").raw


def test_text_of_records_is_never_markup(tmp_path, make):
    put_bank(tmp_path / EVIL.replace("/", ""), heads=("cls", EVIL.replace("/", "|")), commit=EVIL, n_train=EVIL)
    put_attention(tmp_path / "attention", EVIL, r"$\nonsense$")
    page = make(tmp_path, "--title", EVIL)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert EVIL in page.text and r"$\nonsense$" in page.text
    assert "cannot be drawn" not in page.text


def test_a_label_names_a_run_and_the_same_run_is_there_once(all_runs, make):
    page = make(f"mine={all_runs / 'probes'}", all_runs / "probes" / "results.json")
    assert "1 run;" in page.text and "mine" in page.text


def test_every_probe_and_score_is_there_and_seeds_are_averaged(tmp_path, make):
    put_bank(tmp_path / "run")
    page = make(tmp_path / "run")
    for name in bank()["probes"]:
        assert name in page.text
    for said in ("41.00 ± 1.41", "51.00 ± 1.41", "42.00 ± 1.41", "1.2500 ± 0.0000", "769,000", "test top-1 (%)",
                 "best top-1 (%)", "test loss", "cls: 41.0; abmilp: 51.0"):  # fmt: skip
        assert said in page.text, said
    assert "best loss" not in page.text and "per class" not in page.text  # as many images of each: the same number
    results = bank()
    next(iter(results["probes"].values()))["last"]["per_class"] = 39.0
    put(tmp_path / "uneven" / "results.json", results)
    assert make(tmp_path / "uneven").text.count("per class (%)") == 2  # of the last epoch, in both tables


def test_one_evaluation_is_no_curve(tmp_path, make):
    put_bank(tmp_path / "run")
    assert "training loss of run" in make(tmp_path / "run").raw
    put(tmp_path / "run" / "log.txt", log_of(bank(), epochs=1))
    assert "training loss of run" not in make(tmp_path / "run").raw


def test_runs_of_one_name_are_told_apart_by_the_end_of_their_folders(tmp_path, make):
    for kind in ("deep", "wide"):
        put_bank(tmp_path / "far" / "down" / kind / "mae")
    text = make(*(tmp_path / "far" / "down" / kind / "mae" for kind in ("deep", "wide"))).text
    assert " deep/mae Linear probes " in text and " wide/mae Linear probes " in text


def test_records_of_the_repository_give_the_table_of_readme(make):
    paths = [ROOT / "results" / "quickstart" / f"{label}.results.json" for label in ("MAE", "MAE-FT")]
    page, readme = make(*paths), (ROOT / "README.md").read_text()
    for path in paths:
        scores = {}
        for probe in json.loads(path.read_text())["probes"].values():
            scores.setdefault(probe["head"], []).append(probe["last"]["top1"])
        for values in scores.values():
            mean, std = statistics.mean(values), statistics.stdev(values)
            assert f"{mean:.2f} ± {std:.2f}" in page.text
            assert f"{mean:.1f} ± {std:.1f}" in readme
    assert "4,000 training, 1,000 test images" in page.text


def test_held_out_scores_and_the_choice_are_there(tmp_path, make):
    put_bank(tmp_path / "run", held_out=True, n_val=50)
    page = make(tmp_path / "run")
    assert "held-out top-1 (%)" in page.text and "best top-1" not in page.text
    assert "50 held-out" in page.text and "chosen" in page.text
    assert "cls: 41.0" in page.text and "abmilp: 51.0" not in page.text  # not what the test set would choose


def test_several_rates_without_held_out_images_are_warned_of(tmp_path, make):
    put_bank(tmp_path / "run")
    assert "chosen it on the test set" not in make(tmp_path / "run").text
    results = bank()
    results["probes"]["cls/block11/blr0.1/seed1"]["blr"] = 0.2
    put(tmp_path / "several" / "results.json", results)
    assert "chosen it on the test set" in make(tmp_path / "several").text


def test_tables_can_be_sorted_by_number(everything):
    page = everything
    assert all(a["aria-sort"] == "none" for tag, a in page.tags if tag == "th" and a.get("scope") == "col")
    assert "769000.0" in [a.get("data-sort") for tag, a in page.tags if tag == "td"]
    assert "aria-sort" in page.raw.rpartition("<script>")[2]


def test_scores_that_are_not_finite_are_said_and_sort_last(tmp_path, make):
    results = bank()
    lost = results["probes"]["cls/block11/blr0.1/seed1"]
    lost["last"] |= {"top1": None, "loss": float("nan")}
    lost["diverged_at"] = {"epoch": 0, "step": 7}
    put(tmp_path / "run" / "results.json", results)
    page = make(tmp_path / "run")
    assert "not finite in 1 of 2" in page.text and "1 of 2" in page.text and "epoch 1" in page.text
    assert "cls: NaN" in page.text and "nan" not in page.raw.partition("<script>")[0].split("data:")[0]
    assert number(float("inf")).shown == "not finite" and 'data-sort=""' in table(["a"], [[number(None)]])


def test_arguments_that_differ_from_the_defaults_come_first(tmp_path, make):
    results = bank()
    results["args"] |= {"optimizer": ["lars"], "epochs": 7, "forgotten_flag": 3, "resume": "auto", "input_size": None}
    put(tmp_path / "run" / "results.json", results)
    before, _, after = make(tmp_path / "run").text.partition("All 9 arguments")
    assert "7 (default: 90)" in before and "3 (unknown today)" in before and "optimizer lars" not in before
    assert "optimizer lars" in after and "input_size –" in after
    assert "resume auto" in before and "auto (default" not in before and "not set" not in before + after


def test_helpers_refuse_what_would_not_be_a_page():
    with pytest.raises(ValueError, match="nothing outside"):
        element("img", src="https://example.org/a.png")
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        table(["a", "b"], [["x"]])
    assert (
        element("p", None, "a<b", [1, Html("<br>")], title='"<', hidden=False)
        == '<p title="&quot;&lt;">a&lt;b1<br></p>'
    )
    assert element("td", "\x00\ud800") == "<td>\ufffd\ufffd</td>"
    assert filled(["a", "b"], [["x", NONE], ["y", NONE]]) == (["a"], [["x"], ["y"]])


# ---------------------------------------------------------------------------------------------------------------------
# what is loud, unfinished, damaged or foreign
# ---------------------------------------------------------------------------------------------------------------------


def test_random_weights_and_changed_code_are_said_loudly(tmp_path, make):
    put_bank(tmp_path / "good")
    assert "RANDOM" not in make(tmp_path / "good").text
    put_bank(tmp_path / "bad", encoder={**ENCODER, "source": None}, dirty=True)
    page = make(tmp_path / "bad")
    assert "RANDOM WEIGHTS" in page.text and "CODE THAT NO COMMIT HAS" in page.text
    put_bank(tmp_path / "unknown", dirty=None, commit=None)
    assert "commit unknown" in make(tmp_path / "unknown").text


def test_unfinished_runs_show_what_there_is(tmp_path, make):
    results = bank()
    asked = {name: value for name, value in results.items() if name not in ("probes", "seconds")}
    put(tmp_path / "probes" / "args.json", asked)
    put(tmp_path / "probes" / "log.txt", log_of(results, epochs=1) + '{"epoch": 1, "train_lo')
    put(tmp_path / "just begun" / "args.json", asked)
    put_attention(tmp_path / "attention", "MAE", asked=2)
    put_training(tmp_path / "pretrained", "pretrain", epochs=1, ended=False)
    put_training(tmp_path / "tuned", "finetune", epochs=0, ended=False)
    page = make(tmp_path)
    for said in ("not finished: 1 of 2 epochs are logged", "not finished: 0 of 2 epochs are logged", "30.00",
                 "not finished: 1 of 2 encoders have results", "1 of 2 lines cannot be read",
                 "no epoch yet"):  # fmt: skip
        assert said in page.text, said


def test_an_analysis_that_has_nothing_yet_is_shown_as_such(tmp_path, make):
    put(tmp_path / "a" / "args.json", {"args": aggregation()["args"], "encoder": ENCODER, **MADE})
    put_attention(tmp_path / "b", asked=1)
    page = make(tmp_path)
    assert "there is no aggregation.json yet" in page.text and "0 of 1 encoders have results" in page.text


def test_a_damaged_run_is_a_line_and_takes_no_other_along(tmp_path, make):
    put_bank(tmp_path / "good")
    damage = {
        "cut": '{"args": {"cls_fea', "list": [1, 2], "missing": bank() | {"probes": {"cls": {}}}, "text": "x" * 9,
        "kind": bank() | {"probes": "none"}, "losses": bank(),
    }  # fmt: skip
    for name, content in damage.items():
        put(tmp_path / name / "results.json", content)
    put(tmp_path / "losses" / "log.txt", '{"epoch": 0, "train_loss": [1.0]}\n')
    put(tmp_path / "drawn" / "attention.json", {**attention("MAE"), "patches": None, "metrics": {"m": {"blocks": 3}}})
    page = make(tmp_path)
    assert "1 run;" in page.text and page.text.count("Left out:") == len(damage) + 1
    assert "41.00 ± 1.41" in page.text


def test_foreign_folders_are_a_line_each_and_alone_an_error(tmp_path, make):
    put(tmp_path / "foreign" / "args.json", {"args": {"unheard_of": 1}})
    put(tmp_path / "empty" / "notes.txt", "x")
    put(tmp_path / "log" / "log.txt", "{}\n")
    said = make(*(tmp_path / name for name in ("foreign", "empty", "log")), code=2)
    assert said.count("\n") == 1
    for words in ("of none of the programs", "no run and no figure", "which program wrote it"):
        assert words in said
    put_bank(tmp_path / "good")
    page = make(tmp_path / "good", tmp_path / "empty")
    assert "Left out:" in page.text and "no run and no figure" in page.text
    assert "no such file or folder" in make(tmp_path / "absent", code=2)
    assert "is no record of a run" in make(tmp_path / "empty" / "notes.txt", code=2)


def test_a_report_that_cannot_be_written_is_an_error(tmp_path, make):
    put_bank(tmp_path / "run")
    said = make(tmp_path / "run", "--output", tmp_path / "absent" / "report.html", code=2)
    assert "report.html cannot be written: No such file or directory" in said


def test_logs_that_were_kept_with_the_weights_are_of_finished_runs():
    found = find_runs([str(ROOT / "demo")], KINDS)
    assert [(run.name, state(run)) for run in found.runs] == [
        ("mae", (True, "finished")),
        ("mae_ft", (True, "finished")),
    ]


def test_a_jobs_copy_of_the_code_is_no_run(tmp_path):
    put_bank(tmp_path / "job")
    put(tmp_path / "job" / "code" / "snapshot.json", MADE)
    put_bank(tmp_path / "job" / "code" / "demo")
    assert [run.name for run in find_runs([str(tmp_path / "job")], KINDS).runs] == ["job"]


def test_folders_of_figures_are_shown_and_damaged_files_named(tmp_path, make):
    put_picture(tmp_path / "figures" / "a.png")
    put_picture(tmp_path / "figures" / "large.png", size=(2000, 300))
    put(tmp_path / "figures" / "damaged.png", "no picture")
    page = make(tmp_path / "figures")
    found = {a["alt"]: a for tag, a in page.tags if tag == "img"}
    assert found.keys() == {"a.png", "large.png"} and found["large.png"]["width"] == "1600"
    assert base64.b64decode(found["a.png"]["src"].partition(",")[2]) == (tmp_path / "figures" / "a.png").read_bytes()
    assert "damaged.png cannot be shown" in page.text


def test_of_very_many_figures_some_are_shown(tmp_path, make):
    for index in range(30):
        put_picture(tmp_path / "figures" / f"{index}.png", size=(2, 2))
    page = make(tmp_path / "figures")
    assert [tag for tag, _ in page.tags].count("img") == 24 and "24 of 30 pictures are shown" in page.text


def test_encoders_of_one_name_and_of_other_data_are_kept_apart(tmp_path, make):
    put_attention(tmp_path / "one", "MAE")
    put_attention(tmp_path / "two", "MAE")
    put_attention(tmp_path / "few", "MAE", images=3)
    page = make(tmp_path)
    assert "MAE (one)" in page.text and "MAE (two)" in page.text and "MAE (few)" not in page.text
    assert "On image_folder in images: 3 images" in page.text and "cannot be drawn" not in page.text


def test_a_run_that_measured_boxes_alone_is_summed_up_by_them():
    one = {"mean": 57.288, "n": 3, "std": 2.2}
    assert aggregation_result({"over_seeds": {"abmilp": {"maxboxaccv2": one}}}) == "MaxBoxAccV2 (%): abmilp 57.29"
    assert aggregation_result({"over_seeds": {"abmilp": {"top1": one}}}) == "no result yet"
