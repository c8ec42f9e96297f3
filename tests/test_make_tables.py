"""Tables as text: what is measured beside what the paper has, and never a silent comparison of unlike things."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "scripts" / "make_tables.py")


def result(label, family, model, source=None, entropies=(5.0, 5.1), patches=196, cls=True, images=50_000, **others):
    blocks = [{"block": block, "count": images, "mean": mean, "std": 0.1} for block, mean in enumerate(entropies)]
    return {
        "label": label,
        "encoder": {"model": model, "source": source or f"{family}_{model}", "family": family, "sha256": None},
        "random_weights": family is None, "images": images, "input_size": 224, "patches": patches,
        "tokens": patches + cls, "registers": 0, "metrics": {"cls_patch_entropy": {"blocks": blocks}} if cls else {},
        **others,
    }  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Table 3, or another one, of results, as the program prints it."""

    def run(*results, code=0, options=(), which="3"):
        paths = []
        for number, one in enumerate(results):
            paths.append(tmp_path / f"{number}.json")
            paths[-1].write_text(json.dumps(one))
        monkeypatch.setattr(sys, "argv", ["make_tables.py", *map(str, paths), "--table", which, *options])
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
            assert code == 0
        except SystemExit as stopped:
            assert stopped.code == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_published_encoders_stand_beside_the_paper_and_absent_ones_are_dashes(table):
    text = table(result("MAE", "mae", "vit_base_patch16"), result("Dino", "dino", "vit_base_patch16", entropies=(4.6,)))
    assert text == (
        "**Table 3: aggregation entropy in nats, mean over heads, images and blocks**\n"
        "\n"
        "| encoder | ViT | patches | images | entropy | paper | difference |\n"
        "|---|---|---|---|---|---|---|\n"
        "| MAE | ViT-B/16 | 196 | 50,000 | 5.050 | 5.03 | +0.02 |\n"
        "| SimMIM | ViT-B/16 | – | – | – | 4.96 | – |\n"
        "| BEiT-v2 | ViT-B/16 | – | – | – | 4.89 | – |\n"
        "| I-JEPA | ViT-H/14 | – | – | – | 5.28 | – |\n"
        "| CAPI | ViT-L/14 | – | – | – | 5.28 | – |\n"
        "| DINO (Dino) | ViT-B/16 | 196 | 50,000 | 4.600 | 4.70 | -0.10 |\n"
    )


def test_models_without_cls_show_both_conventions(table):
    text = table(result("I-JEPA", "ijepa", "vit_huge_patch14", patches=256, cls=False))
    assert row(text, "| I-JEPA") == (
        "| I-JEPA <sup>1</sup> | ViT-H/14 | 256 | – | 5.545 / 5.278 | 5.28 | +0.27 / +0.00 |"
    )
    assert text.endswith(
        "<sup>1</sup> no [cls] token, hence uniform weights: ln 256 of its own patches / ln 196, which the paper "
        "prints for all such models\n"
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"images": 1000}, "not comparable: other images than the 50,000 of ImageNet-1k's validation set"),
        ({"input_size": 448}, "not comparable: images of 448 pixels, the paper's have 224"),
        ({"cls": False}, "not comparable: the paper measured this encoder with its [cls] token"),
    ],
    ids=["images", "size", "cls"],
)
def test_what_was_measured_otherwise_is_marked_and_not_compared(table, changes, note):
    text = table(result("MAE", "mae", "vit_base_patch16", **changes))
    assert row(text, "| MAE <sup>").endswith("| 5.03 | – |") and note in text


@pytest.mark.parametrize(
    ("family", "source", "note"),
    [
        (None, None, "random weights"),
        ("mae_ft", "mae_ft.safetensors", "not in the paper's table"),
        ("beitv2", "beitv2_vit_base_patch16_300e", "not in the paper's table"),  # not the file that the paper uses
    ],
)
def test_encoders_that_the_paper_lacks_are_rows_of_their_own(table, family, source, note):
    text = table(result("other", family, "vit_base_patch16", source))
    assert row(text, "| other").endswith("| 5.050 | – | –" + " |") and note in text
    assert row(text, "| MAE") == "| MAE | ViT-B/16 | – | – | – | 5.03 | – |"


def test_file_of_the_right_family_is_compared_and_said_to_be_a_file(table):
    text = table(result("SimMIM", "simmim", "vit_base_patch16", "simmim.pth"))
    assert row(text, "| SimMIM") == "| SimMIM <sup>1</sup> | ViT-B/16 | 196 | 50,000 | 5.050 | 4.96 | +0.09 |"
    assert "<sup>1</sup> weights from simmim.pth, of the family and architecture of the paper's encoder" in text


def test_other_formats_hold_the_same_cells(table, tmp_path):
    one = result("[MAE] 1_%", "mae", "vit_base_patch16", images=7)
    latex = table(one, options=["--format", "latex", "--output", str(tmp_path / "table.tex")])
    assert r"MAE ([MAE] 1\_\%)$^{1}$ & ViT-B/16 & 196 & 7 & 5.050 & 5.03 & -- \\" in latex
    assert latex.startswith("% Table 3") and latex.endswith("\\end{tabular}\n")
    assert (tmp_path / "table.tex").read_text() == latex
    lines = table(one, options=["--format", "csv"]).splitlines()
    assert lines[0] == "encoder,ViT,patches,images,entropy,paper,difference,notes"
    assert lines[1].startswith('MAE ([MAE] 1_%),ViT-B/16,196,7,5.050,5.03,–,"not comparable: other images')


def test_mistakes_are_one_line(table, tmp_path):
    without = result("MAE", "mae", "vit_base_patch16", metrics={})
    assert "MAE: cls_patch_entropy was not measured" in table(without, code=2)
    error = table({"label": "MAE"}, code=2)
    assert "is no attention.json" in error and error.count("\n") == 1
    error = table(result("MAE", "mae", "vit_base_patch16"), code=2, options=["--output", "/nowhere/table.md"])
    assert "/nowhere/table.md cannot be written" in error


def aggregation(model="mae", arch="vit_base_patch16", images=50_000, **others):
    def over(values):
        return {quantity: {"mean": mean, "n": 3, "std": std} for quantity, (mean, std) in values.items()}

    boxes = {"attn-mn": (53.36, None), "abmilp": (59.0, 0.25)}
    values = {
        "attn-mn": {"top1": (67.6, 0.1), "aggregation_entropy": (5.13, None)},
        "abmilp": {"top1": (71.6, 0.14), "aggregation_entropy": (4.8, 0.01)},
        "ap12": {"top1": (75.0, 0.2), "aggregation_entropy": (5.0, 0.02)},
    }
    for rule, box in boxes.items():
        values[rule]["maxboxaccv2"] = box
    return {
        "encoder": {"model": arch, "source": f"{model}_{arch}", "family": model, "sha256": None},
        "random_weights": False, "images": images, "input_size": 224, "uniform_entropy": 5.278, "rules": [],
        "over_seeds": {rule: over(of_rule) for rule, of_rule in values.items()}, **others,
    }  # fmt: skip


def test_rules_stand_beside_the_papers(table):
    text = table(aggregation(), which="6")
    lines = [line for line in text.splitlines() if line.startswith("| MAE")]
    assert lines == [
        "| MAE | ViT-B/16 | mean [cls] attention | 67.6 ± 0.1 | 67.8 | -0.2 | 5.13 | 5.14 | -0.01 |",
        "| MAE | ViT-B/16 | lowest-entropy [cls] attention | – | 66.3 | – | – | 4.77 | – |",
        "| MAE | ViT-B/16 | central patch | – | 65.2 | – | – | 4.70 | – |",
        "| MAE | ViT-B/16 | oracle's [cls] attention | – | 70.9 | – | – | 4.89 | – |",
        "| MAE | ViT-B/16 | AbMILP | 71.6 ± 0.1 | 71.6 | +0.0 | 4.80 ± 0.01 | 4.80 | +0.00 |",
        "| MAE | ViT-B/16 | ap12 | 75.0 ± 0.2 | – | – | 5.00 ± 0.02 | – | – |",
    ]


def test_localisation_stands_beside_the_papers_and_absent_encoders_are_dashes(table):
    text = table(aggregation(), which="8")
    assert "| MAE | ViT-B/16 | mean [cls] attention | 53.4 | 53.3 | +0.1 |" in text
    assert "| MAE | ViT-B/16 | AbMILP | 59.0 ± 0.2 | 59.4 | -0.4 |" in text
    assert "| BEiT-v2 | ViT-B/16 | AbMILP | – | 65.1 | – |" in text and "ap12" not in text


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"images": 99}, "not comparable: other images than the 50,000"),
        ({"localization": {"transform": "crop"}}, "not comparable: central crops"),
        ({"probes": {"n_test": 1000}}, "not comparable: probes tested on 1,000 images"),
        ({"input_size": 448}, "not comparable: images of 448 pixels"),
    ],
    ids=["images", "crop", "probes", "size"],
)
def test_what_was_localised_otherwise_is_marked_and_not_compared(table, changes, note):
    text = table(aggregation(**changes), which="8")
    assert row(text, "| MAE <sup>1</sup> | ViT-B/16 | AbMILP").endswith("| 59.4 | – |") and note in text


def test_encoders_that_the_paper_did_not_aggregate_follow(table):
    text = table(aggregation("dino"), which="8")
    assert row(text, "| dino_vit_base_patch16 <sup>1</sup> | ViT-B/16 | AbMILP").endswith("| 59.0 ± 0.2 | – | – |")
    assert "not in the paper's table" in text


def test_tables_take_their_own_results(table):
    error = table(result("MAE", "mae", "vit_base_patch16"), which="6", code=2)
    assert "is no aggregation.json" in error and error.count("\n") == 1
    without = aggregation()
    for quantities in without["over_seeds"].values():
        quantities.pop("maxboxaccv2", None)
    assert "maxboxaccv2 was not measured" in table(without, which="8", code=2)
