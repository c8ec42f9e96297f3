"""The report: complete, valid and self-contained HTML that says what the records say, whatever these hold."""

import base64
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

from report.page import render
from report.runs import KINDS, find_runs
from report.tables import table

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "scripts" / "make_report.py")
VOID = ("br", "img", "meta")  # HTML elements without an end tag
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


def attention(label, images=500, source="mae.pth", **others):
    blocks = [{"block": b, "count": images, "mean": 4.0 + b / 8, "std": 0.1, "mean_per_head": [4.0, 4.1],
               "std_per_head": [0.1, 0.1]} for b in range(2)]  # fmt: skip
    metric = {"unit": "nats", "definition": "H(a'_0)", "source": "Fig. 4", "axis": "head", "blocks": blocks,
              "lower": None, "upper": None, "uniform": {"name": "ln M", "value": 5.278}}  # fmt: skip
    return {"label": label, "encoder": {**ENCODER, "source": source}, "random_weights": source is None,
            "images": images, "input_size": 224, "patches": 196, "tokens": 197, "registers": 0,
            "metrics": {"cls_patch_entropy": metric}, "seconds": 30.0, **MADE, **others}  # fmt: skip


def put_attention(folder, *labels, started=None, num_images=None, seed=0, **options):
    args = {"reduction": "auto", "dataset": "image_folder", "data_path": "images", "label": list(labels)}
    args |= {"num_images": num_images, "seed": seed}
    put(folder / "args.json", {"args": args, "encoders": [ENCODER] * (started or len(labels)), **MADE})
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
            "args": {"kl_direction": "row_col", "dataset": "image_folder", "data_path": "images"}, **MADE}  # fmt: skip


def put_training(folder, program, epochs=2, ended=True, data_path="images", encoder=ENCODER):
    tuning = program == "finetune"
    args = {"epochs": 2, "data_path": data_path, "dataset": "image_folder", "model": "vit_base_patch16",
            **({"layer_decay": 0.65} if tuning else {"mask_ratio": 0.75})}  # fmt: skip
    run = {"args": args, "lr": 1e-3, **({"encoder": encoder} if tuning else {}), **MADE}
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
        self.raw, self.open, self.tags, self.words, self.ids, self.rows = text, [], [], [], [], []
        self.feed(text)
        self.close()
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes)
        self.tags.append((tag, found))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def row(self, *begin):
        """The first row of a table that begins with these cells."""
        return next(row for row in self.rows if row[: len(begin)] == [*begin])

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


# ---- the page


def test_the_page_is_valid_and_loads_nothing(everything):
    for tag, attributes in everything.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    links = [attributes["href"][1:] for tag, attributes in everything.tags if tag == "a"]
    assert links and set(links) <= set(everything.ids)
    (policy,) = [a["content"] for _, a in everything.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'; img-src data:" in policy
    style = re.search(r"<style>(.*?)</style>", everything.raw, re.S)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert "http" not in style + re.search(r"<script>(.*?)</script>", everything.raw, re.S)[1]


def test_every_program_has_its_section_with_numbers_figures_and_provenance(everything):
    for text in (*(kind.title for kind in KINDS.values()), "Figures", "5 runs; the newest record is of",
                 "c0ffee", "torch 2.11", "f" * 64, "5" * 64, "program --flags", "1:06:40", "61.50", "64.25", "71.75",
                 "33.50", "480", "3.250", "0.625", "encoder.safetensors, sha256",
                 "1,000 training, 500 test images, 10 classes", "image_folder in images: 500 images"):  # fmt: skip
        assert text in everything.text, text
    images = [attributes for tag, attributes in everything.tags if tag == "img"]
    assert {image["alt"] for image in images} >= {"maps.png", "reconstruction.png", "figure.png"}
    curves = [attributes["d"] for tag, attributes in everything.tags if attributes.get("class") == "curve"]
    assert len(curves) > 8 and all(re.fullmatch(r"M[-\d.e]+ [-\d.e]+(L[-\d.e]+ [-\d.e]+)*", c) for c in curves)


def test_the_same_records_give_the_same_bytes(all_runs, make):
    assert make(all_runs / "probes").raw == make(all_runs / "probes").raw


def test_text_of_records_is_never_markup(tmp_path, make):
    name = EVIL.replace("/", "|")
    args = {"cls_features": [EVIL], "data_path": EVIL, EVIL: EVIL, "epochs": EVIL}
    hostile = {"commit": EVIL, "command": EVIL, "n_train": EVIL, "versions": {EVIL: EVIL}, "args": args}
    put_bank(tmp_path / name, heads=("cls", name), **hostile)
    put_attention(tmp_path / "attention", EVIL, r"$\nonsense$", source=EVIL)
    rules = aggregation()
    rules["rules"][0] |= {"name": EVIL, "notes": [EVIL]}
    rules["localization"] |= {"boxes": EVIL, "best_head": EVIL}
    put(tmp_path / "aggregation" / "aggregation.json", rules)
    put_training(tmp_path / "pretrained", "pretrain")
    log = tmp_path / "pretrained" / "log.txt"
    put(log, log.read_text().replace("loss", json.dumps(EVIL)[1:-1]))
    put_picture(tmp_path / "figures" / f"{name}.png")
    put(tmp_path / "figures" / f"damaged {name}.png", "")
    page = make(tmp_path, tmp_path / "figures", "--title", EVIL)
    assert [a.get("type") for tag, a in page.tags if tag == "script" and a != {"type": "application/json"}] == [None]
    assert "<script>alert" not in page.raw and "alert(1)" in page.raw
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) > 12 and r"$\nonsense$" in page.text


def test_tables_drop_empty_columns_and_sort_by_number(everything):
    assert [name for name, _ in table([{"a": "x", "b": None}, {"a": "y", "c": 1}]).columns] == ["a", "c"]
    assert [cell.data for _, (cell,) in table([{"a": float("nan")}, {"a": 2}]).rows] == ["", 2.0]
    assert "<title>\ufffd\ufffd&lt;</title>" in render("\x00\ud800<", [])
    assert "769000.0" in [a.get("data-value") for tag, a in everything.tags if tag == "td"]
    assert all(a["aria-sort"] == "none" for tag, a in everything.tags if tag == "th" and a["scope"] == "col")


def test_arguments_that_differ_from_the_defaults_come_first(tmp_path, make):
    results = bank()
    results["args"] |= {"optimizer": ["lars"], "epochs": 7, "forgotten_flag": 3, "resume": "auto", "input_size": None}
    put(tmp_path / "run" / "results.json", results)
    before, _, after = make(tmp_path / "run").text.partition("All 9 arguments")
    assert "7 (default: 90)" in before and "3 (default: unknown today)" in before and "optimizer lars" not in before
    assert "optimizer lars" in after and "input_size –" in after
    assert "resume auto" in before and "auto (default" not in before


# ---- finding runs


def test_a_label_names_a_run_and_a_run_named_twice_is_listed_once(all_runs, make):
    page = make(f"mine={all_runs / 'probes'}", all_runs / "probes" / "results.json")
    assert "1 run;" in page.text and page.row("mine", "Linear probes")


def test_runs_of_one_name_are_distinguished_by_their_folders(tmp_path, make):
    folders = [tmp_path / "far" / "down" / kind / "mae" for kind in ("deep", "wide")]
    for folder in folders:
        put_bank(folder)
    page = make(*folders)
    assert all(page.row(str(folder), "Linear probes") for folder in folders)


def test_damaged_runs_are_listed_and_others_shown(tmp_path, make):
    put_bank(tmp_path / "good")
    damage = {
        "cut": '{"args": {"cls_fea', "list": [1, 2], "missing": bank() | {"probes": {"cls": {}}}, "text": "x" * 9,
        "kind": bank() | {"probes": "none"}, "losses": bank(), "other probes": bank(),
        "two programs": bank() | {"args": {"cls_features": [], "mask_ratio": 0.75}},
    }  # fmt: skip
    for name, content in damage.items():
        put(tmp_path / name / "results.json", content)
    put(tmp_path / "losses" / "log.txt", '{"epoch": 0, "train_loss": [1.0]}\n')
    put(tmp_path / "other probes" / "log.txt", log_of(bank(heads=("ap1", "ca1"))))
    put(tmp_path / "drawn" / "attention.json", {**attention("MAE"), "patches": None, "metrics": {"m": {"blocks": 3}}})
    page = make(tmp_path)
    assert "1 run;" in page.text and page.text.count("Left out:") == len(damage) + 1
    assert "41.00 ± 1.41" in page.text


def test_foreign_folders_are_listed_and_alone_an_error(tmp_path, make):
    put(tmp_path / "foreign" / "args.json", {"args": {"unheard_of": 1}})
    put(tmp_path / "empty" / "notes.txt", "x")
    put(tmp_path / "log" / "log.txt", "{}\n")
    error = make(*(tmp_path / name for name in ("foreign", "empty", "log")), code=2)
    assert error.count("\n") == 1
    for text in ("not written by any of main_linprobe", "no run and no figure", "which program wrote it"):
        assert text in error
    put_bank(tmp_path / "good")
    assert "Left out:" in make(tmp_path / "good", tmp_path / "empty").text
    assert "no such file or folder" in make(tmp_path / "absent", code=2)
    assert "not a record of a run" in make(tmp_path / "empty" / "notes.txt", code=2)


def test_a_report_that_cannot_be_written_is_an_error(tmp_path, make):
    put_bank(tmp_path / "run")
    error = make(tmp_path / "run", "--output", "/proc/absent/report.html", code=2)
    assert "report.html cannot be written: No such file or directory" in error


def test_logs_kept_beside_the_weights_are_finished_runs():
    runs = find_runs([str(ROOT / "demo")])[0]
    assert {"mae", "mae_ft"} <= {run.name for run in runs} and all(run.state == ("good", "finished") for run in runs)


def test_a_code_snapshot_of_a_job_is_not_a_run(tmp_path):
    put_bank(tmp_path / "job")
    put(tmp_path / "job" / "code" / "snapshot.json", MADE)
    put_bank(tmp_path / "job" / "code" / "demo")
    assert [run.name for run in find_runs([str(tmp_path / "job")])[0]] == ["job"]


def test_figures_are_shown_and_damaged_files_named(tmp_path, make):
    put_picture(tmp_path / "figures" / "a.png")
    put_picture(tmp_path / "figures" / "large.png", size=(2000, 300))
    put(tmp_path / "figures" / "damaged.png", "no picture")
    put_bank(tmp_path / "figures" / "run")
    put(tmp_path / "figures" / "run" / "examples.safetensors", "no tensors")
    page = make(tmp_path / "figures")
    assert "examples.safetensors cannot be shown" in page.text
    found = {a["alt"]: a for tag, a in page.tags if tag == "img"}
    assert found.keys() == {"a.png", "large.png"} and found["large.png"]["width"] == "2000"
    assert base64.b64decode(found["a.png"]["src"].partition(",")[2]) == (tmp_path / "figures" / "a.png").read_bytes()
    assert "damaged.png cannot be shown" in page.text
    for index in range(30):
        put_picture(tmp_path / "many" / f"{index}.png", size=(2, 2))
    assert "24 of 30 pictures are shown" in make(tmp_path / "many").text


# ---- numbers: every one is right, or says why it may not be


def test_every_probe_is_listed_and_seeds_are_averaged(tmp_path, make):
    put_bank(tmp_path / "run")
    page = make(tmp_path / "run")
    assert all(page.row(name) for name in bank()["probes"]) and "<figcaption>training loss" in page.raw
    assert page.row("run", "cls")[2:6] == ["41.00 ± 1.41", "1.2500 ± 0.0000", "42.00 ± 1.41", "11"]
    assert page.row("run", "abmilp")[2] == "51.00 ± 1.41"
    summary = "cls/block11/blr0.1 41.00; abmilp/block11/blr0.1 51.00"
    for text in ("769,000", "test top-1 (%)", "best top-1 (%)", "test loss", summary):
        assert text in page.text, text
    assert "best loss" not in page.text and "per class" not in page.text  # as many images of each: the same number
    results = bank()
    next(iter(results["probes"].values()))["last"]["per_class"] = 39.0
    put(tmp_path / "uneven" / "results.json", results)
    assert make(tmp_path / "uneven").text.count("per class (%)") == 1


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


def test_held_out_scores_choose_and_the_test_images_do_not(tmp_path, make):
    put_bank(tmp_path / "run", held_out=True, n_val=50)
    page = make(tmp_path / "run")
    assert "held-out top-1 (%)" in page.text and "best top-1" not in page.text and "50 held-out" in page.text
    assert "blr0.1 41.00" in page.text and "blr0.1 51.00" not in page.text and "chosen" in page.row("run", "cls")
    put_bank(tmp_path / "one rate")
    assert "chosen on the test images" not in make(tmp_path / "one rate").text
    results = bank()
    results["probes"]["cls/block11/blr0.2/seed1"] = results["probes"].pop("cls/block11/blr0.1/seed1") | {"blr": 0.2}
    put(tmp_path / "several" / "results.json", results)
    assert "chosen on the test images" in make(tmp_path / "several").text


@pytest.mark.parametrize(
    "change, cell",
    [
        ({"diverged_at": {"epoch": 0, "step": 7}}, "diverged in 1 of 2"),  # its scores are those of before, and finite
        ({"last": scores(None)}, "not finite in 1 of 2"),
        ({"last": scores(float("nan"))}, "not finite in 1 of 2"),
        ({"last": {"epoch": 1, "loss": 1.25}}, "missing in 1 of 2"),
    ],
)
def test_a_seed_without_a_valid_score_is_not_averaged(tmp_path, make, change, cell):
    results = bank()
    results["probes"]["cls/block11/blr0.1/seed1"] |= change
    put(tmp_path / "run" / "results.json", results)
    page = make(tmp_path / "run")
    assert page.row("run", "cls")[2] == cell and page.row("run", "abmilp")[2] == "51.00 ± 1.41"
    assert f"cls/block11/blr0.1 {cell}" in page.text and ("in epoch 1" in page.text) == ("diverged_at" in change)
    assert "nan" not in page.raw.partition("<script>")[0].split("data:")[0]


def test_what_varies_between_seeds_is_stated(tmp_path, make):
    put_bank(tmp_path / "old")
    put_bank(tmp_path / "new", seeds_vary=["weights", "order", "views"])
    page = make(tmp_path)
    assert "old: seeds vary initial weights only" in page.text
    assert "new: seeds vary initial weights, data order and augmentation" in page.text


@pytest.mark.parametrize(
    "change",
    [{"test_images": "e" * 64}, {"n_test": 400}, {"train_images": "a" * 64}, {"n_train": 10}, {"headline": "per_class"},
     {"args": {**bank()["args"], "data_path": "elsewhere"}}],
)  # fmt: skip
def test_runs_on_other_data_are_in_another_table(tmp_path, make, change):
    put_bank(tmp_path / "a")
    put_bank(tmp_path / "b")
    assert make(tmp_path).text.count("Mean ± standard deviation (n - 1)") == 1
    put_bank(tmp_path / "c", **change)
    assert make(tmp_path).text.count("Mean ± standard deviation (n - 1)") == 2


def test_trainings_and_analyses_of_other_data_are_not_compared(tmp_path, make):
    for name, path in (("a", "images"), ("b", "images"), ("c", "elsewhere")):
        put_training(tmp_path / "trained" / name, "pretrain", data_path=path)
        result = aggregation()
        result["args"]["data_path"] = path
        put(tmp_path / "aggregated" / name / "aggregation.json", result)
    assert make(tmp_path / "trained").text.count("Values of the last epoch") == 2
    assert make(tmp_path / "aggregated").text.count("Mean ± standard deviation (n - 1)") == 2


def test_encoders_are_compared_on_the_same_images_only(tmp_path, make):
    put_attention(tmp_path / "one", "MAE")
    put_attention(tmp_path / "two", "MAE")
    put_attention(tmp_path / "few", "MAE", images=3)
    put_attention(tmp_path / "others", "MAE", test_images="e" * 64)
    for seed in (0, 1):
        put_attention(tmp_path / f"seed{seed}", "MAE", num_images=5, seed=seed, images=5)
    page = make(tmp_path)
    assert "MAE (two)" in page.text
    assert not any(f"MAE ({name})" in page.text for name in ("one", "few", "others", "seed0", "seed1"))
    assert "On image_folder in images: 3 images" in page.text


def test_arguments_that_differ_between_compared_runs_are_listed(tmp_path, make):
    put_bank(tmp_path / "a")
    put_bank(tmp_path / "b", args={**bank()["args"], "epochs": 90})
    page = make(tmp_path)
    assert page.row("epochs", "2", "90") and ["blr", "0.1", "0.1"] not in page.rows


def test_counts_of_multi_label_scores_are_not_percentages(tmp_path, make):
    results = bank(headline="map")
    for probe in results["probes"].values():
        probe["last"] = {"epoch": 1, "map": 40.0, "any_match": 60.0, "loss": 0.1, "n": 500, "classes": 78}
        del probe["best"]
    put(tmp_path / "run" / "results.json", results)
    page = make(tmp_path / "run")
    assert "classes (%)" not in page.text and "78.00" not in page.text
    assert "test classes with a positive image" in page.text
    assert page.row("run", "cls")[2:4] == ["40.00 ± 0.00", "60.00 ± 0.00"] and "test mAP (%)" in page.text


def test_unscored_images_are_stated(tmp_path, make):
    put_bank(tmp_path / "run")
    assert "were scored" not in make(tmp_path / "run").text
    put_bank(tmp_path / "run", n_test=502)
    assert "only 500 of 502 test images were scored" in make(tmp_path / "run").text


def test_logs_give_each_epoch_once_and_at_its_number(tmp_path, make):
    results = bank()
    put(tmp_path / "run" / "args.json", {name: value for name, value in results.items() if name != "probes"})
    lines = log_of(results, epochs=4).splitlines()
    lost = json.loads(lines[3]) | {"train_loss": [None] * 4}
    put(tmp_path / "run" / "log.txt", "\n".join([lines[0], lines[2], lines[2], json.dumps(lost), "{"]))
    page = make(tmp_path / "run")
    assert "in epoch 4" in page.text and "1 of 5 lines cannot be read" in page.text
    ((run,), *_) = find_runs([str(tmp_path / "run")])
    assert [record["epoch"] for record in run.epochs] == [0, 2, 3]


def test_rules_are_means_over_their_probes_and_the_seeds_of_learned_ones_are_folded(tmp_path, make):
    result, maps = aggregation(), {"maxboxacc": 71.75, "boxaccv2": []}
    fixed, pos = result["rules"]
    score = {"blr": 0.1, "optimizer": "lars", "diverged_at": None}
    fixed["scores"] = {f"seed{seed}": {**score, "top1": top1} for seed, top1 in enumerate((30.5, 31.5))}
    fixed["entropy"]["images"] = 498
    seeds, scores = {"probe": "p", "head": "abmilp"}, {"p": {**score, "top1": 50.0}}
    learned = [{**pos, **seeds, "name": f"abmilp/seed{n}", "seed": n, "scores": scores} for n in (0, 1)]
    for rule in learned:
        rule["entropy"] = {"mean": 3.0 + rule["seed"]}
    result["localization"]["maps"] |= {rule["name"]: {"maxboxaccv2": 60.0 + rule["seed"], **maps} for rule in learned}
    result |= {"rules": [fixed, *learned], "matrices": {}}

    def rows():
        put(tmp_path / "a" / "aggregation.json", result)
        page = make(tmp_path)
        return [page.row("a", name)[2:6] for name in ("attn-mn", "abmilp")]

    of_fixed = ["31.00 ± 0.71", "3.250", "64.25", "71.75"]
    assert rows() == [of_fixed, ["50.00 ± 0.00", "3.500 ± 0.707", "60.50 ± 0.71", "71.75 ± 0.00"]]
    assert "498" in make(tmp_path).row("a", "attn-mn") and "61.00" in make(tmp_path).row("abmilp/seed1")
    fixed["scores"]["seed0"]["diverged_at"] = {"epoch": 0, "step": 1}
    learned[1]["scores"] = {"p": {**score, "top1": 50.0, "diverged_at": {"epoch": 0, "step": 1}}}
    assert rows() == [["diverged in 1 of 2", *of_fixed[1:]], ["diverged in 1 of 2"] * 4]


def test_pairs_of_rules_say_in_how_many_images_they_are_finite(tmp_path, make):
    result = aggregation()
    result["matrices"]["kl"]["images"] = [[500, 321], [500, 500]]
    put(tmp_path / "a" / "aggregation.json", result)
    assert "finite in 321 of them" in make(tmp_path).text


def test_an_analysis_of_boxes_alone_is_summarised_by_them(tmp_path, make):
    result = aggregation()
    result["rules"] = [{key: value for key, value in rule.items() if key != "entropy"} for rule in result["rules"]]
    put(tmp_path / "a" / "aggregation.json", result)
    assert make(tmp_path).row("a", "Aggregation")[3] == "MaxBoxAccV2 (%): attn-mn 64.25; pos 64.25"


# ---- what to know before reading a number


@pytest.mark.parametrize(
    "change, badge, warning",
    [
        ({"encoder": {**ENCODER, "source": None}}, "random weights", "RANDOM WEIGHTS"),
        ({"dirty": True}, "uncommitted code", "UNCOMMITTED CODE"),
        ({"dirty": None, "commit": None}, "commit unknown", "do not say which commit"),
    ],
)
def test_doubtful_runs_are_marked_on_top_and_beside_their_numbers(tmp_path, make, change, badge, warning):
    put_bank(tmp_path / "good")
    assert warning not in make(tmp_path / "good").text
    put_bank(tmp_path / "bad", **change)
    page = make(tmp_path)
    assert warning in page.text and page.row(f"bad {badge}", "cls") and page.row("good", "cls")


def test_probes_that_learned_nothing_are_marked_on_top_and_in_their_row(tmp_path, make):
    results = bank()
    results["probes"]["cls/block11/blr0.1/seed1"]["learned_nothing"] = "test top-1 10.0 is chance"
    put(tmp_path / "run" / "results.json", results)
    page = make(tmp_path / "run")
    assert "LEARNED NOTHING" in page.text and page.row("run", "cls learned nothing") and page.row("run", "abmilp")
    assert "test top-1 10.0 is chance" in page.text


def test_a_run_continued_with_other_code_is_marked(tmp_path, make):
    put_attention(tmp_path / "run", "MAE", "DINO", dirty=True)
    put_attention(tmp_path / "run2", "MAE", commit="facade")
    put(tmp_path / "probed" / "aggregation.json", aggregation() | {"probes": {"dirty": True}})
    page = make(tmp_path)
    for name, badge in (("run", "uncommitted code"), ("run2", "several commits"), ("probed", "uncommitted code")):
        assert any(row[0] == name and badge in row[2] for row in page.rows if len(row) > 2)
    assert "facade" in page.text


def test_fine_tuning_from_scratch_is_not_called_untrained(tmp_path, make):
    put_training(tmp_path / "tuned", "finetune", encoder={**ENCODER, "source": None})
    page = make(tmp_path)
    assert "from scratch" in page.text and "untrained network" not in page.text


def test_unfinished_runs_show_what_there_is_and_say_so_beside_it(tmp_path, make):
    results = bank()
    started = {name: value for name, value in results.items() if name not in ("probes", "seconds")}
    put(tmp_path / "probes" / "args.json", started)
    put(tmp_path / "probes" / "log.txt", log_of(results, epochs=1) + '{"epoch": 1, "train_lo')
    put(tmp_path / "just begun" / "args.json", started)
    put_attention(tmp_path / "attention", "MAE", started=2)
    put_attention(tmp_path / "none", started=1)
    put_attention(tmp_path / "mixed", "MAE", "DINO", started=1)
    put(tmp_path / "aggregation" / "args.json", {"args": aggregation()["args"], "encoder": ENCODER, **MADE})
    put_training(tmp_path / "pretrained", "pretrain", epochs=1, ended=False)
    put_training(tmp_path / "tuned", "finetune", epochs=0, ended=False)
    page = make(tmp_path)
    for done in ("1 of 2 epochs", "0 of 2 epochs", "1 of 2 results", "0 of 1 results", "2 of 1 results"):
        assert f"not finished: {done}" in page.text
    assert "1 of 2 lines cannot be read" in page.text and "no result yet" in page.text
    assert page.row("probes not finished: 1 of 2 epochs", "cls/block11/blr0.1")[2] == "30.00 ± 0.00"
    section = page.raw.split('id="main_linprobe"')[1].split("</section>")[0]
    assert "<figcaption>training loss" not in section  # one epoch is not a curve
