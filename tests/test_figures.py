"""Figures show the numbers of the result files, on honest axes, and the same bytes each time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba

import attention.figures
from attention.figures import (
    FIGURES,
    choose_metrics,
    draw_attention,
    draw_figures,
    draw_heads,
    draw_spectra,
    draw_token_maps,
    model_name,
)
from attention.metrics import GROUPS, METRICS, REFERENCES, Sizes
from cli.console import parse
from scripts import plot_depth
from util.plotting import COLOURS

ROOT = Path(__file__).resolve().parent.parent
HEADS = 3
pytestmark = pytest.mark.usefixtures("rendered")


def result(label="MAE", model="vit_base_patch16", depth=12, cls=True, level=0.5):
    """As main_analyze_attention.py writes it, of invented numbers: means about `level` of each metric's upper bound."""
    sizes = Sizes(tokens=16 + cls, patches=16, registers=0, grid=(4, 4), patch_size=16)
    draw = np.random.default_rng(len(label) + depth)

    def entry(metric):
        bound = REFERENCES[metric.upper](sizes) if metric.upper else 1.0
        found = {"count": 9, "mean": bound * level * draw.uniform(0.9, 1), "std": 0.05 * bound}
        if metric.axis:
            count = {"head": HEADS, "frequency": 2, "rank": 5}[metric.axis]
            found[f"mean_per_{metric.axis}"] = (found["mean"] * draw.uniform(0.5, 1.5, count)).tolist()
        return found | ({"std": None} if metric.over_images else {})

    metrics = {}
    for name, metric in METRICS.items():
        if (cls or "cls" not in metric.needs) and "registers" not in metric.needs:
            bounds = {kind: getattr(metric, kind) for kind in ("lower", "upper", "uniform")}
            values = {kind: key and {"name": key, "value": REFERENCES[key](sizes)} for kind, key in bounds.items()}
            fields = {"unit": metric.unit, "definition": metric.definition, "axis": metric.axis, **values}
            blocks = [{"block": block, **entry(metric)} for block in range(depth)]
            metrics[name] = fields | ({"embedding": entry(metric)} if metric.of_tokens else {}) | {"blocks": blocks}
    return {"label": label, "encoder": {"model": model}, "patches": 16, "tokens": 16 + cls, "metrics": metrics}


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were about to be written."""
    figures = []
    monkeypatch.setattr(attention.figures, "save_figure", lambda figure, *targets: figures.append(figure))
    return figures


def lines_of(axis):
    """The lines that are data."""
    return [line for line in axis.get_lines() if line.get_color() != "0.4"]


def words_of(axis):
    return " ".join(text.get_text() for text in axis.texts)


def test_lines_are_the_numbers_of_the_results(drawn):
    results = [result("MAE"), result("DINO", level=0.7)]
    names = ["cls_patch_entropy", "image_log_singular_values", "patch_log_amplitude"]
    draw_attention(results, names, "unused")
    for axis, name in zip(drawn[0].axes, names, strict=True):
        for line, one in zip(lines_of(axis), results, strict=True):
            metric = one["metrics"][name]
            entries = ([metric["embedding"]] if "embedding" in metric else []) + metric["blocks"]
            np.testing.assert_array_equal(line.get_ydata(), [entry["mean"] for entry in entries])
            first = -1 if "embedding" in metric else 0  # the block's own number in the file, the embedding before it
            np.testing.assert_array_equal(line.get_xdata(), np.arange(len(entries)) + first)
    band = drawn[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    first = [(block["mean"], block["std"]) for block in results[0]["metrics"]["cls_patch_entropy"]["blocks"]]
    assert band.min() == min(mean - std for mean, std in first) and band.max() == max(mean + std for mean, std in first)
    assert not drawn[0].axes[1].collections  # no spread over images, no band


def test_blocks_are_counted_from_0_as_by_the_flags(drawn):
    draw_attention([result()], ["cls_patch_entropy", "patch_log_amplitude"], "unused")
    plain, after_embedding = drawn[0].axes
    assert plain.get_xlabel() == "block (from 0)" and list(plain.get_xticks()) == [0, 3, 6, 9]
    assert after_embedding.get_xlabel() == "block (from 0); E: embedding"
    assert [label.get_text() for label in after_embedding.get_xticklabels()] == ["E", "0", "3", "6", "9"]
    draw_heads([result()], ["cls_patch_entropy"], "unused")
    assert drawn[-1].get_supxlabel() == "block (from 0)"
    assert drawn[-1].axes[0].images[0].get_extent()[:2] == [-0.5, 11.5]


def test_label_has_one_colour_and_marker_everywhere(drawn):
    results = [result("MAE"), result("DINO"), result("DINO", "vit_small_patch16"), result("iBOT", "vit_small_patch16")]
    draw_attention(results, GROUPS["paper"], "unused")
    looks = {}
    for axis in drawn[0].axes:
        for line in lines_of(axis):
            looks.setdefault(line.get_color(), set()).add((line.get_marker(), line.get_linestyle()))
    assert list(looks) == list(COLOURS[:3]) and all(len(look) == 1 for look in looks.values())
    legend = drawn[0].legends[0]
    pairs = zip(legend.texts, legend.legend_handles, strict=True)
    colours = {text.get_text(): handle.get_color() for text, handle in pairs}
    assert [colours[label] for label in ("MAE", "DINO", "iBOT")] == list(COLOURS[:3])


def test_architectures_are_rows_and_what_is_not_measured_says_so(drawn):
    draw_attention([result(), result("CAPI", "vit_large_patch14", 24, cls=False)], GROUPS["paper"], "unused")
    axes = drawn[0].axes
    assert len(axes) == 8 and [len(lines_of(axis)) for axis in axes] == [1, 1, 1, 1, 0, 0, 1, 1]
    assert "not measured" in words_of(axes[4]) and "ViT-B/16" in words_of(axes[0]) and "ViT-L/14" in words_of(axes[4])


def test_bounds_are_drawn_where_they_do_not_squash_the_data_and_named_everywhere(drawn):
    for level in (0.01, 0.9):
        draw_attention([result(level=level)], ["cls_self_attention", "cls_patch_entropy"], "unused")
    (low_attention, low_entropy), (high_attention, high_entropy) = (figure.axes for figure in drawn)
    assert "uniform 1/N = 0.0588; largest 1 ↑" in words_of(low_attention) and low_attention.get_ylim()[1] < 0.2
    assert "largest 1" in words_of(high_attention) and "↑" not in words_of(high_attention)
    assert high_attention.get_ylim()[1] > 1
    assert "uniform ln M = 2.77 ↑" in words_of(low_entropy) and "↑" not in words_of(high_entropy)
    assert [line.get_ydata()[0] for line in high_entropy.get_lines()][-1] == math.log(16)


def test_axis_of_what_cannot_be_negative_starts_at_zero_or_near_the_data(drawn):
    draw_attention([result(level=0.1), result("DINO", level=0.5)], ["patch_self_attention"], "unused")
    draw_attention([result(level=0.95)], ["patch_patch_entropy"], "unused")
    assert drawn[0].axes[0].get_ylim()[0] == 0
    assert drawn[1].axes[0].get_ylim()[0] > 2


def test_missing_means_are_not_drawn(drawn):
    one = result()
    for block in one["metrics"]["image_log_singular_values"]["blocks"]:
        block["mean"] = None
    draw_attention([one], ["image_log_singular_values"], "unused")
    assert np.isnan(lines_of(drawn[0].axes[0])[0].get_ydata()[1:]).all()


@pytest.mark.parametrize("count", [1, 8, 17])
def test_legend_names_all_and_covers_no_panel(drawn, count):
    draw_attention([result(f"method {number}", level=0.9) for number in range(count)], ["cls_patch_entropy"], "unused")
    drawn[0].draw_without_rendering()
    box = drawn[0].legends[0].get_window_extent()
    panel = drawn[0].axes[0].get_tightbbox()
    assert len(drawn[0].legends[0].texts) == count + 1 and not box.overlaps(panel)
    assert drawn[0].axes[0].get_window_extent().height > 100  # of points at 100 per inch
    assert box.x0 >= 0 and box.x1 <= drawn[0].bbox.width
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines_of(drawn[0].axes[0])}
    assert len(styles) == count


def test_heads_share_the_scale_of_their_metric(drawn):
    results = [result(), result("DINO", level=0.9)]
    draw_heads(results, ["cls_self_attention", "patch_patch_entropy"], "unused")
    images = [axis.images[0] for axis in drawn[0].axes if axis.images]
    for name, pair in zip(("cls_self_attention", "patch_patch_entropy"), (images[:2], images[2:]), strict=True):
        values = [[block["mean_per_head"] for block in one["metrics"][name]["blocks"]] for one in results]
        for image, value in zip(pair, values, strict=True):
            np.testing.assert_array_equal(image.get_array().T, value)
            assert image.get_clim() == (np.min(values), np.max(values))
    axis = images[0].axes
    assert list(axis.get_yticks()) == list(range(HEADS)) and axis.get_ylabel() == "head (from 0)"
    assert images[0].get_extent()[2:] == [HEADS - 0.5, -0.5]  # the first head is at 0, above


def test_spectra_have_a_line_per_depth_and_the_axis_of_their_kind(drawn):
    one = result()
    draw_spectra([one], ["patch_log_amplitude", "image_log_singular_values"], "unused")
    amplitude, spectrum = drawn[0].axes[:2]
    assert len(amplitude.get_lines()) == len(spectrum.get_lines()) == 13
    np.testing.assert_array_equal(amplitude.get_lines()[0].get_xdata(), [0, 0.5])  # f * 2 / g on a 4 x 4 grid
    np.testing.assert_array_equal(spectrum.get_lines()[0].get_xdata(), [1, 2, 3, 4, 5])
    metric = one["metrics"]["patch_log_amplitude"]
    for line, entry in zip(amplitude.get_lines(), [metric["embedding"], *metric["blocks"]], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), entry["mean_per_frequency"])


def test_tokens_are_coloured_by_class_and_images_differ(drawn):
    points = np.random.default_rng(0).normal(size=(4, 5, 2)).tolist()
    tsne = {"images": [3, 1, 4, 5], "classes": ["cat", "dog", "cat", "dog"], "maps": [{"block": 0, "points": points}]}
    draw_token_maps(tsne, "MAE", "unused")
    found = drawn[0].axes[0].collections
    np.testing.assert_array_equal([one.get_offsets() for one in found], points)
    assert len({tuple(one.get_facecolor()[0]) for one in found}) == 4
    hues = [np.array(one.get_facecolor()[0][:3]) for one in found]
    nearest = [min(range(2), key=lambda k, hue=hue: abs(hue - to_rgba(COLOURS[k])[:3]).sum()) for hue in hues]
    assert nearest == [0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_same_results_give_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        draw_attention([result()], ["cls_patch_entropy"], tmp_path / f"{name}.{suffix}")
    first = (tmp_path / f"a.{suffix}").read_bytes()
    assert first == (tmp_path / f"b.{suffix}").read_bytes() and len(first) > 3000


def test_all_figures_of_what_was_measured_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(attention.figures, "save_figure", lambda figure, *targets: [path.touch() for path in targets])
    everything, flow = result(), result()
    flow["metrics"] = {name: flow["metrics"][name] for name in GROUPS["flow"] if name in flow["metrics"]}
    for name, one in (("all", everything), ("flow", flow)):
        (tmp_path / name).mkdir()
        draw_figures([one], tmp_path / name)
    names = {f"{name}{suffix}" for name, kind in FIGURES.items() for suffix in kind.suffixes}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    assert {path.name for path in (tmp_path / "flow").iterdir()} == {"attention.png", "attention.pdf", "heads.png"}


def test_metrics_keep_the_order_of_the_words_and_groups_skip_what_is_absent():
    results = [result(cls=False)]
    assert choose_metrics(["patch_patch_entropy", "paper"], results, ("head",)) == [
        "patch_patch_entropy", "patch_self_attention_relative"
    ]  # fmt: skip
    assert choose_metrics(["paper"], results, ("rank",)) == []


def test_models_are_called_as_papers_call_them():
    names = {"vit_huge_patch14": "ViT-H/14", "vit_demo_patch8": "ViT-demo/8", "something": "something"}
    assert {model: model_name(model) for model in names} == names


def test_program_draws_every_kind(tmp_path, run_script):
    (tmp_path / "a.json").write_text(json.dumps(result(depth=3)))
    for kind in FIGURES:
        target = tmp_path / f"{kind}.svg"
        assert run_script("plot_attention.py", tmp_path / "a.json", "--kind", kind, "--output", target) == (0, "", "")
        assert target.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.json", "a.json"], "two results are called 'MAE' (ViT-B/16)"),
        (["a.json", "--metrics", "nonsense"], "--metrics: unknown 'nonsense': "),
        (["a.json", "--metrics", "patch_register_attention"], "were not measured; available"),
        (
            ["a.json", "--kind", "spectra", "--metrics", "paper"],
            "--kind spectra: nothing of --metrics paper was measured",
        ),
        (["a.json", "--output", "a.jpeg"], "must end in .png, .pdf, .svg"),
        (["a.json", "--output", "nowhere/a.png"], "cannot be written: No such file or directory"),
        (["missing.json"], "missing.json cannot be read"),
        (["b.json"], "b.json is not an attention.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, run_script, words, message):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(result(depth=2)))
    Path("b.json").write_text("[]")
    code, _, error = run_script("plot_attention.py", *words)
    assert code == 2 and message in error and error.count("\n") == 1


def test_depth_names_the_first_block_with_most_of_the_accuracy(tmp_path, capsys):
    run = json.loads((ROOT / "results" / "quickstart" / "MAE.results.json").read_text())
    probes, accuracies = {}, {"cls": (20, 35, 38, 40), "abmilp": (58, 60, 30, 50)}
    for name, probe in run["probes"].items():
        for block, top1 in enumerate(accuracies.get(probe["head"], ())):
            probes[f"{name}/{block}"] = {**probe, "block": block, "last": {**probe["last"], "top1": top1}}
    (tmp_path / "results.json").write_text(json.dumps({**run, "probes": probes}))
    (tmp_path / "attention.json").write_text(json.dumps(result(depth=4)))
    target = tmp_path / "depth.svg"
    pair = f"MAE={tmp_path / 'results.json'},{tmp_path / 'attention.json'}"
    plot_depth.main(parse(plot_depth.get_args_parser(), [pair, "--output", str(target)]))
    assert target.read_text().startswith("<?xml")
    assert "| MAE | cls | 3 | 40.0 | 2 |\n| MAE | abmilp | 1 | 60.0 | 0 |" in capsys.readouterr().out
