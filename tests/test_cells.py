"""Cells of the paper's tables: values from results, and what stands in the way of comparing them."""

import copy
import json
import math
from argparse import Namespace

import pytest

import main_analyze_aggregation
import main_analyze_attention
import main_linprobe
from cli.arguments import plain
from cli.console import parse
from data_sets.demo import generate
from paper import cells
from paper.cells import cell_of, cells_of, short_head
from scripts import record as program

ORIGIN = {
    "command": "main.py", "commit": "abc", "dirty": False, "versions": {"torch": "2.11"}, "device": "CPU",
    "processes": 1, "threads": 2, "seconds": 9.0, "test_images": "f" * 64, "classes": 1000, "oracle": None,
    "train_images": "a" * 64, "finished": "2025-01-31T12:00:00+00:00",
}  # fmt: skip
ENCODER = {"model": "vit_base_patch16", "source": "mae_vit_base_patch16", "family": "mae", "sha256": "e" * 64}


def probing(tops=(67.0, 68.0, 69.0), head="cls", flags=(), encoder=ENCODER, **changes):
    """results.json of the paper's protocol on ImageNet, of one head."""
    args = parse(main_linprobe.get_args_parser(), ["--data_path", "x", "--dataset", "imagenet1k", *flags])
    probes = {
        f"{head}/block11/blr0.1/seed{seed}": {
            "aggregation": head, "head": head, "block": 11, "blr": 0.1, "lr": None, "seed": seed, "optimizer": "lars",
            "parameters": 7, "diverged_at": None, "last": {"epoch": 89, "top1": top, "n": 50_000},
        }
        for seed, top in enumerate(tops)
    }  # fmt: skip
    return {
        "probes": probes, "args": plain(args), "encoder": encoder, "effective_batch": 16_384, "bn_group": 2048,
        "lr": dict.fromkeys(probes, 6.4), "n_train": 1_281_167, "n_val": 0, "n_test": 50_000, "headline": "top1",
        **ORIGIN, **changes,
    }  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """The cells of a result, by head."""

    def run(result, name="results.json"):
        (tmp_path / name).write_text(json.dumps(result))
        return {measured.cell.head: measured for measured in cells_of(tmp_path / name)}

    return run


# ---- the vocabulary


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("abmilp", "abmilp"), ("abmilp:depth=2", "abmilp-d2-relu"), ("abmilp:depth=4,act=tanh", "abmilp-d4-tanh"),
        ("abmilp:sa=both", "abmilp-sa"), ("ap12", "ap12"), ("attn-mn", "attn-mn"), ("ca1", "ca1"), ("cls", "cls"),
    ],
)  # fmt: skip
def test_heads_have_the_papers_names(ours, theirs):
    assert short_head(ours) == theirs


def test_other_options_keep_cells_apart():
    words = ["abmilp", "abmilp:sa=map", "abmilp:content=all", "abmilp:depth=2,sa=both", "abmilp:depth=2,cond=pe"]
    assert len({short_head(word) for word in words}) == len(words)


@pytest.mark.parametrize(
    ("source", "family", "model"),
    [
        ("mae_vit_base_patch16", "mae", "mae"), ("encoder.safetensors", "mae_ft", "mae_ft"), (None, None, "random"),
        ("beitv2_vit_base_patch16_300e", "beitv2", "beitv2_300e"), ("full.pth", "dino_full", "dino"),
        ("vit_base_patch16_224.mae", "timm", "timm_vit_base_patch16_224_mae"),
        ("hf:facebook/dinov2-base", "transformers", "hf_facebook_dinov2_base"),
    ],
)  # fmt: skip
def test_encoders_that_differ_have_cells_that_differ(source, family, model):
    encoder = {"source": source, "family": family, "model": "vit_base_patch16"}
    assert cell_of({"args": {"dataset": "demo"}, "encoder": encoder}, "top1", "cls").model == model


# ---- what stands in the way


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"flags": ["--epochs", "10"]}, "epochs 10, the paper's 90"),
        ({"flags": ["--final_norm"]}, "final_norm True, the paper's False"),
        ({"flags": ["--momentum", "0.5"]}, "momentum 0.5, the paper's 0.9"),
        ({"flags": ["--input_size", "448"]}, "images of 448 pixels, the paper's have 224"),
        ({"flags": ["--num_heads", "6"]}, "num_heads 6, the paper's None"),
        ({"args": {"mean": [0.5, 0.5, 0.5]}}, "mean [0.5, 0.5, 0.5], the paper's None"),
        ({"flags": ["--loader", "tensor"]}, "loader tensor, the paper's pil"),
        ({"effective_batch": 4096}, "effective_batch 4096, the paper's 16384"),
        ({"bn_group": 512}, "bn_group 512, the paper's 2048"),
        ({"n_train": 1000}, "trained on 1,000 images, the data set has 1,281,167"),
        ({"n_test": 49_999}, "tested on 49,999 images, the data set has 50,000"),
        ({"encoder": {**ENCODER, "source": None, "family": None}}, "random weights"),
        ({"head": "abmilp:sa=both"}, "optimizer lars, the paper's sgd"),
        ({"head": "dino", "oracle": {"source": "m.pth"}}, "the oracle is m.pth, the paper's is dino_vit_base_patch16"),
    ],
)  # fmt: skip
def test_departures_from_the_paper_are_said(made, changes, obstacle):
    result = probing(**{name: value for name, value in changes.items() if name != "args"})
    result["args"] |= changes.get("args", {})
    (record,) = made(result).values()
    assert obstacle in record.obstacles


def test_encoder_of_unnamed_sizes_has_a_cell_of_the_last_block_and_says_what_was_assumed(made):
    record = made(probing(encoder={**ENCODER, "model": "vit_64x4", "assumed": ["8 heads"]}))["cls"]
    assert record.cell.arch == "vit_64x4" and record.notes == ["assumed of the weights: 8 heads"]
    assert "images of unknown pixels, the paper's have 224" in record.obstacles


def test_images_that_could_not_be_read_are_an_obstacle(made):
    result = probing()
    next(iter(result["probes"].values()))["last"]["n"] = 49_998
    assert "measured on 49,998 of 50,000 images" in made(result)["cls"].obstacles


def test_large_encoders_have_fifty_epochs(made):
    encoder = {**ENCODER, "model": "vit_large_patch16", "source": "mae_vit_large_patch16"}
    result = probing(encoder=encoder, flags=["--model", "vit_large_patch16", "--epochs", "50"])
    for probe in result["probes"].values():
        probe["block"] = 23
    assert made(result)["cls"].obstacles == []


@pytest.mark.parametrize(
    ("family", "flags", "obstacles"),
    [
        ("capi", ["--final_norm"], []), ("capi", [], ["final_norm False, the paper's True"]),
        ("ijepa", ["--final_norm"], ["final_norm True, the paper's False"]), ("ijepa", [], []),
    ],
)  # fmt: skip
def test_tokens_of_capi_are_those_that_its_public_model_returns(made, tmp_path, family, flags, obstacles):
    encoder = {**ENCODER, "source": f"{family}_vit_base_patch16", "family": family}
    trained = probing(head="abmilp", encoder=encoder, flags=flags)
    assert made(trained)["abmilp"].obstacles == obstacles
    found = by_quantity(aggregation(encoder=encoder, probes=trained), tmp_path)
    assert found["aggregation_entropy", "abmilp"].obstacles == obstacles


def test_blocks_before_the_last_are_cells_of_their_own(made):
    result = probing()
    for probe in result["probes"].values():
        probe["block"] = 5
    assert list(made(result)) == ["cls-block5"]


def several_rates(**changes):
    result = probing()
    for probe in list(result["probes"].values()):
        name = f"cls/block11/blr0.2/seed{probe['seed']}"
        result["probes"][name] = {**copy.deepcopy(probe), "blr": 0.2}
        result["lr"][name] = 12.8
    return {**result, **changes}


def test_rates_that_only_the_test_set_could_choose_are_refused(made):
    with pytest.raises(ValueError, match=r"cls has several settings \(lars 0.1, lars 0.2\).*--val_fraction"):
        made(several_rates())


def test_rates_that_held_out_images_chose_are_recorded_alone(made):
    result = several_rates(n_val=1167, n_train=1_280_000)
    for probe in result["probes"].values():
        probe["chosen"] = probe["blr"] == 0.2
    record = made(result)["cls"]
    assert record.settings["blr"] == 0.2 and len(record.values) == 3 and record.obstacles == []
    assert record.notes == ["trained on 1,280,000 of 1,281,167 images, rate 0.2 chosen on the others"]


def test_diverged_probes_have_no_cell(made, caplog):
    result = probing()
    next(iter(result["probes"].values()))["diverged_at"] = {"epoch": 3, "step": 1}
    assert made(result) == {}


def test_files_are_said_to_be_files(made):
    record = made(probing(encoder={**ENCODER, "source": "mine.pth"}))["cls"]
    assert record.notes == ["weights from mine.pth; nothing shows that they are those of the paper"]


LESS = {name: value for name, value in probing().items() if name != "test_images"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (probing(flags=["--dataset", "image_folder"]), "--dataset image_folder can be any images"),
        (LESS, "it has no test_images"),
        ({"args": {}}, "not a result of this version's programs"),
        ([], "not a result of this version's programs"),
        (b"\xff\xfe{", "not a result"),
        (b"[" * 100_000, "not a result"),
        (b"{", "not a result"),
        (probing((math.nan,)), "has the values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_results_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as error:
        cells_of(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_run_of_which_nothing_is_left_is_said(tmp_path):
    result = probing()
    for probe in result["probes"].values():
        probe["diverged_at"] = {"epoch": 3, "step": 1}
    run = put(tmp_path / "run", "results.json", result)
    with pytest.raises(ValueError, match=f"{run}/results.json: nothing to record"):
        recorded(tmp_path, run)


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the --output_dir of a finished run"):
        program.results_of(tmp_path)


def put(folder, name, result):
    folder.mkdir()
    (folder / name).write_text(json.dumps(result))
    return folder


def recorded(tmp_path, *runs, replace=False):
    program.main(Namespace(runs=list(runs), results=tmp_path / "results", replace=replace))
    return cells.recorded(tmp_path / "results", ["imagenet1k"])


def test_a_cell_has_one_record_which_another_run_may_replace(tmp_path):
    first, other = (put(tmp_path / str(top), "results.json", probing((top,))) for top in (67.0, 68.0))
    (measured,) = recorded(tmp_path, first, first).values()  # the same run twice
    assert measured.values == [67.0]
    with pytest.raises(ValueError, match=r"both measured imagenet1k/mae/.*/cls: remove one of them"):
        recorded(tmp_path, first, other)
    with pytest.raises(ValueError, match="measured: use --replace"):
        recorded(tmp_path, other)
    (measured,) = recorded(tmp_path, other, replace=True).values()
    assert measured.values == [68.0]


EVERYTHING = ["weights", "order", "views"]


@pytest.mark.parametrize(
    ("changes", "varied"),
    [({}, None), ({"seeds_vary": ["weights"]}, ["weights"]), ({"seeds_vary": EVERYTHING}, EVERYTHING)],
)
def test_record_says_what_its_seeds_vary(made, tmp_path, changes, varied):
    trained = probing(**changes)
    assert made(trained)["cls"].settings["seeds_vary"] == varied
    found = by_quantity(aggregation(probes=trained), tmp_path)
    assert found["aggregation_entropy", "abmilp"].settings["seeds_vary"] == varied
    assert "seeds_vary" not in found["aggregation_entropy", "attn-mn"].settings


# ---- analyses


def attention(**changes):
    args = parse(main_analyze_attention.get_args_parser(), ["--data_path", "x", "--dataset", "imagenet1k"])
    blocks = [{"block": block, "count": 50_000, "mean": mean} for block, mean in enumerate((5.0, 5.1) * 6)]
    return {
        "label": "MAE", "encoder": ENCODER, "images": 50_000, "input_size": 224, "patches": 196, "tokens": 197,
        "registers": 0, "metrics": {"cls_patch_entropy": {"blocks": blocks}}, "args": plain(args), "amp": "bfloat16",
        "reduction": "auto", "seed": 0, "n_test": 50_000, **ORIGIN, **changes,
    }  # fmt: skip


def test_entropy_is_the_mean_over_blocks(made):
    record = made(attention(), "attention.json")["cls"]
    assert record.mean == pytest.approx(5.05) and record.std is None and record.obstacles == []
    some = made(attention(images=1000), "attention.json")["cls"]
    assert some.obstacles == ["measured on 1,000 of 50,000 images"]


def test_mean_over_some_of_the_blocks_is_refused(made):
    result = attention()
    del result["metrics"]["cls_patch_entropy"]["blocks"][3]
    with pytest.raises(ValueError, match="cls_patch_entropy of 11 blocks, vit_base_patch16 has 12"):
        made(result, "attention.json")


def test_uniform_weights_stand_for_encoders_without_cls(made):
    record = made(attention(tokens=272, patches=256, registers=16, metrics={}), "attention.json")["pos"]
    assert record.mean == math.log(256)


def aggregation(**changes):
    args = parse(main_analyze_aggregation.get_args_parser(), ["--data_path", "x", "--dataset", "imagenet1k"])
    of_probes = {**probing(), "folder": "runs/mae"}
    score = {"top1": 71.0, "blr": 0.1, "optimizer": "lars", "diverged_at": None}
    rules = [{"name": "attn-mn", "head": "attn-mn", "block": 11, "probe": None, "seed": None, "notes": [], "scores": {},
              "entropy": {"mean": 5.14}}]  # fmt: skip
    for seed in (0, 1):
        rules.append({**rules[0], "name": f"abmilp/seed{seed}", "head": "abmilp", "probe": f"p{seed}", "seed": seed,
                      "scores": {f"p{seed}": score}, "entropy": {"mean": (4.8, 4.9)[seed]}})  # fmt: skip
    maps = {rule["name"]: {"maxboxaccv2": 50.0 + i} for i, rule in enumerate(rules)}
    boxes = {"images": 50_000, "transform": "resize", "step": 0.001, "maps": maps}
    return {
        "encoder": ENCODER, "input_size": 224, "images": 50_000, "rules": rules, "localization": boxes,
        "probes": of_probes, "args": plain(args), "n_test": 50_000, **ORIGIN, **changes,
    }  # fmt: skip


def by_quantity(result, tmp_path):
    path = tmp_path / "aggregation.json"
    path.write_text(json.dumps(result))
    return {(measured.cell.quantity, measured.cell.head): measured for measured in cells_of(path)}


def test_rules_are_recorded_over_their_seeds_and_localisation_calls_cls_attention_cls(tmp_path):
    found = by_quantity(aggregation(), tmp_path)
    assert set(found) == {
        ("aggregation_entropy", "attn-mn"), ("aggregation_entropy", "abmilp"), ("maxboxaccv2", "cls"),
        ("maxboxaccv2", "abmilp"),
    }  # fmt: skip
    assert found["aggregation_entropy", "abmilp"].values == [4.8, 4.9]
    assert found["maxboxaccv2", "abmilp"].seeds == [0, 1] and found["maxboxaccv2", "cls"].mean == 50.0
    assert all(record.obstacles == [] for record in found.values())


def test_what_is_wrong_with_the_probes_is_wrong_with_their_rules(tmp_path):
    found = by_quantity(aggregation(probes=probing(flags=["--epochs", "2"], n_train=100)), tmp_path)
    learned = found["aggregation_entropy", "abmilp"].obstacles
    assert learned == ["probes trained on 100 images", "epochs 2, the paper's 90"]
    assert found["aggregation_entropy", "attn-mn"].obstacles == []


def test_localisation_of_another_kind_is_an_obstacle(tmp_path):
    result = aggregation()
    result["localization"] |= {"transform": "crop", "step": 0.1}
    (crop, step) = by_quantity(result, tmp_path)["maxboxaccv2", "cls"].obstacles
    assert "central crops" in crop and "steps of 0.1" in step


def test_demo_runs_become_records_of_the_demo(tmp_path):
    """The programs themselves: what they write is what the ledger reads."""
    generate(tmp_path / "data", 20, 10, workers=1)
    common = ["--dataset", "demo", "--data_path", tmp_path / "data", "--amp", "float32", "--num_workers", "0",
              "--device", "cpu"]  # fmt: skip
    encoder = ["--model", "vit_demo_patch8", "--finetune", "demo/mae.safetensors"]

    def call(module, *words):
        module.main(parse(module.get_args_parser(), list(map(str, [*common, *words]))))

    call(main_linprobe, *encoder, "--cls_features", "cls", "abmilp:depth=2", "--seeds", "0", "1", "--batch_size", "10",
         "--epochs", "1", "--warmup_epochs", "0", "--output_dir", tmp_path / "probes")  # fmt: skip
    call(main_analyze_attention, *encoder, "--metrics", "paper", "--label", "MAE", "--output_dir", tmp_path / "flow")
    call(main_analyze_aggregation, "--probes", tmp_path / "probes", "--rules", "attn-mn", "--boxes",
         tmp_path / "data" / "boxes.csv", "--loc_workers", "0", "--num_examples", "0", "--output_dir",
         tmp_path / "rules")  # fmt: skip
    runs = [tmp_path / name for name in ("probes", "flow", "rules")]
    program.main(Namespace(runs=runs, results=tmp_path / "results", replace=False))
    found = cells.recorded(tmp_path / "results", ["demo"])
    assert {(cell.quantity, cell.head, len(record.values)) for cell, record in found.items()} == {
        ("top1", "cls", 2), ("top1", "abmilp-d2-relu", 2), ("aggregation_entropy_block_mean", "cls", 1),
        ("aggregation_entropy", "attn-mn", 1), ("aggregation_entropy", "abmilp-d2-relu", 2),
        ("maxboxaccv2", "cls", 1), ("maxboxaccv2", "abmilp-d2-relu", 2),
    }  # fmt: skip
    assert all(record.obstacles == [] and record.result["n_test"] == 10 for record in found.values())
