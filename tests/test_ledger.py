"""The ledger: records of runs, sealed and in their places, with what stands in the way of comparing them."""

import copy
import json
import math
from argparse import Namespace
from datetime import UTC, datetime

import pytest

import cli.launcher
import main_analyze_aggregation
import main_analyze_attention
import main_linprobe
from cli.arguments import plain
from cli.console import parse
from data_sets.demo import generate
from paper.ledger import Cell, cell_of, read_ledger, short_head, write_record
from scripts import record as program
from util.files import sha256

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


def log_of(result):
    """The last line of log.txt."""
    probes = result.get("probes") if isinstance(result, dict) and "rules" not in result else None
    if not probes:
        return "{}"
    last = {name: {"top1": probe["last"]["top1"]} for name, probe in probes.items()}
    return json.dumps({"epoch": result["args"]["epochs"] - 1, "test": last}) + "\n"


@pytest.fixture
def made(tmp_path):
    """The records of results, by their cell; the folder of each holds a log."""

    def run(result, name="results.json"):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "log.txt").write_text(log_of(result))
        (folder / name).write_text(json.dumps(result))
        return {record["head"]: record for record in program.records(folder / name)}

    return run


# ---------------------------------------------------------------------------------------------------------------------
# the vocabulary
# ---------------------------------------------------------------------------------------------------------------------


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
    ],
)  # fmt: skip
def test_encoders_that_differ_have_cells_that_differ(source, family, model):
    encoder = {"source": source, "family": family, "model": "vit_base_patch16"}
    assert cell_of("imagenet1k", encoder, "top1", "cls").model == model


# ---------------------------------------------------------------------------------------------------------------------
# seals and places
# ---------------------------------------------------------------------------------------------------------------------


def test_record_says_where_its_number_comes_from(made, tmp_path):
    record = made(probing())["cls"]
    assert (record["value"], record["std"], record["n"], record["seeds"]) == (68.0, 1.0, 3, [0, 1, 2])
    assert record["obstacles"] == record["notes"] == [] and record["weights"]["sha256"] == "e" * 64
    assert record["settings"]["epochs"] == 90 and record["settings"]["lr"] == 6.4
    assert record["data"]["fingerprint"] == "f" * 64 and record["data"]["train_fingerprint"] == "a" * 64
    assert record["sources"] == [{
        "command": "main.py", "seed": 0, "hardware": {"device": "CPU", "processes": 1, "threads": 2}, "seconds": 9.0,
        "finished": "2025-01-31T12:00:00+00:00", "result_sha256": sha256(tmp_path / "run" / "results.json"),
        "log_sha256": sha256(tmp_path / "run" / "log.txt"),
    }]  # fmt: skip
    path = write_record(tmp_path / "results", record)
    assert path == tmp_path / "results/imagenet1k/mae.vit_base_patch16.top1.cls.json"
    cell = Cell("imagenet1k", "mae", "vit_base_patch16", "top1", "cls")
    assert read_ledger(tmp_path / "results", ["imagenet1k"]) == {cell: json.loads(path.read_text())}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("68.0", "71.6", 1), lambda text: text.replace('"dirty": false', '"dirty": true'),
        lambda text: text[:-50], lambda text: text.replace("68.0", "NaN", 1), lambda text: "[]", lambda text: "{}",
        lambda text: text.replace('"n": 3', '"n": 3, "more": 1'), lambda text: "[" * 100_000,
        lambda text: "",
    ],
)  # fmt: skip
def test_changed_record_is_refused_with_its_name(made, tmp_path, damage):
    path = write_record(tmp_path, made(probing())["cls"])
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"{path} (was changed|is not a record)") as error:
        read_ledger(tmp_path, ["imagenet1k"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["demo/mae.{}.top1.cls.json", "imagenet1k/mae.{}.top1.pos.json"])
def test_record_in_another_place_is_refused(made, tmp_path, place):
    path = write_record(tmp_path, made(probing())["cls"])
    (tmp_path / "demo").mkdir()
    path.rename(tmp_path / place.format("vit_base_patch16"))
    with pytest.raises(ValueError, match="belongs in"):
        read_ledger(tmp_path, [place.split("/")[0]])


def test_another_measurement_is_not_written_over(made, tmp_path):
    record = made(probing())["cls"]
    assert write_record(tmp_path, record) == write_record(tmp_path, record)
    with pytest.raises(ValueError, match="holds another measurement"):
        write_record(tmp_path, made(probing((1.0,)))["cls"])


# ---------------------------------------------------------------------------------------------------------------------
# what stands in the way
# ---------------------------------------------------------------------------------------------------------------------


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
    assert obstacle in record["obstacles"]


def test_encoder_of_unnamed_sizes_has_a_cell_of_the_last_block_and_says_what_was_assumed(made):
    record = made(probing(encoder={**ENCODER, "model": "vit_64x4", "assumed": ["8 heads"]}))["cls"]
    assert record["arch"] == "vit_64x4" and record["notes"] == ["assumed of the weights: 8 heads"]
    assert "images of unknown pixels, the paper's have 224" in record["obstacles"]


def test_images_that_could_not_be_read_are_an_obstacle(made):
    result = probing()
    next(iter(result["probes"].values()))["last"]["n"] = 49_998
    assert "measured on 49,998 of 50,000 images" in made(result)["cls"]["obstacles"]


def test_large_encoders_have_fifty_epochs(made):
    encoder = {**ENCODER, "model": "vit_large_patch16", "source": "mae_vit_large_patch16"}
    result = probing(encoder=encoder, flags=["--model", "vit_large_patch16", "--epochs", "50"])
    for probe in result["probes"].values():
        probe["block"] = 23
    assert made(result)["cls"]["obstacles"] == []


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
    assert made(trained)["abmilp"]["obstacles"] == obstacles
    found = by_quantity(aggregation(encoder=encoder, probes=trained), tmp_path)
    assert found["aggregation_entropy", "abmilp"]["obstacles"] == obstacles


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
    assert record["settings"]["lr"] == 12.8 and record["n"] == 3 and record["obstacles"] == []
    assert record["notes"] == ["trained on 1,280,000 of 1,281,167 images, rate 0.2 chosen on the others"]


def test_diverged_probes_have_no_cell(made, caplog):
    result = probing()
    next(iter(result["probes"].values()))["diverged_at"] = {"epoch": 3, "step": 1}
    assert made(result) == {}


def test_files_are_said_to_be_files(made):
    record = made(probing(encoder={**ENCODER, "source": "mine.pth"}))["cls"]
    assert record["notes"] == ["weights from mine.pth; nothing shows that they are those of the paper"]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (probing(flags=["--dataset", "image_folder"]), "--dataset image_folder can be any images"),
        ({**probing(), "bn_group": None, "test_images": ...}, "at this version"),
        ({"args": {}}, "at this version"),
        ([], "at this version"),
    ],
)  # fmt: skip
def test_runs_that_do_not_say_enough_are_refused(made, result, words):
    if isinstance(result, dict) and result.get("test_images") is ...:
        del result["test_images"]
    with pytest.raises(ValueError, match=words) as error:
        made(result)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe{", "cannot be read as JSON"), (b"[" * 100_000, "cannot be read as JSON"), (b"{", "cannot be read"),
     (json.dumps(probing((math.nan,))).encode(), "must be finite")],
)  # fmt: skip
def test_results_that_are_none_are_named(tmp_path, content, words):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        program.records(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_run_of_which_nothing_is_left_is_said(tmp_path):
    result = probing()
    for probe in result["probes"].values():
        probe["diverged_at"] = {"epoch": 3, "step": 1}
    run = put(tmp_path / "run", "results.json", result)
    with pytest.raises(ValueError, match=f"{run}: nothing to record"):
        recorded(tmp_path, run)


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the --output_dir of a finished run"):
        program.results_of(tmp_path)


@pytest.mark.parametrize("epoch", [{"epoch": 5, "loss": 0.4}, {"epoch": 5, "loss": 0.4, "test": {"top1": 50.0}}])
def test_training_of_an_encoder_is_said_to_be_that(made, epoch):
    with pytest.raises(ValueError, match="is of the training of an encoder, of which no table has a cell"):
        made({"last": epoch, "seconds": 3.0, "args": {}})


# ---------------------------------------------------------------------------------------------------------------------
# runs of several seeds
# ---------------------------------------------------------------------------------------------------------------------


def run_of_seed(folder, seed, top, flags=(), **changes):
    """A run folder like those of submitit_linprobe.py --sweep seed 0 1 2."""
    result = probing((top,), flags=["--seed", str(seed), "--output_dir", str(folder), *flags], **changes)
    ((name, probe),) = result["probes"].items()
    name = name.replace("seed0", f"seed{seed}")
    result |= {"probes": {name: {**probe, "seed": seed}}, "lr": {name: 6.4}, "command": f"main.py --seed {seed}"}
    return put(folder, "results.json", result)


def put(folder, name, result):
    folder.mkdir()
    (folder / name).write_text(json.dumps(result))
    (folder / "log.txt").write_text(log_of(result))
    return folder


def recorded(tmp_path, *runs):
    program.main(Namespace(runs=list(runs), results=tmp_path / "results", replace=False))
    return read_ledger(tmp_path / "results", ["imagenet1k"])


def test_runs_of_a_sweep_over_seeds_are_one_record_with_all_their_sources(tmp_path):
    runs = [run_of_seed(tmp_path / f"seed={seed}", seed, top) for seed, top in ((2, 69.0), (0, 67.0), (1, 68.0))]
    (record,) = recorded(tmp_path, *runs).values()
    assert (record["value"], record["std"], record["n"]) == (68.0, 1.0, 3)
    assert (record["values"], record["seeds"], record["obstacles"]) == ([67.0, 68.0, 69.0], [0, 1, 2], [])
    assert [source["seed"] for source in record["sources"]] == [0, 1, 2]
    for source, run in zip(record["sources"], (runs[1], runs[2], runs[0]), strict=True):
        assert source["command"] == f"main.py --seed {source['seed']}"
        assert source["log_sha256"] == sha256(run / "log.txt")
        assert source["result_sha256"] == sha256(run / "results.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flags": ["--epochs", "80"]}, "epochs 90 and 80"),
        ({"flags": ["--crop", "center"]}, "crop mae and center"),
        ({"flags": ["--multilabel_metric", "any_match", "--warmup_epochs", "5"]}, "warmup_epochs 10 and 5"),
        ({"commit": "abd"}, "commit abc and abd"),
        ({"dirty": True}, "dirty False and True"),
        ({"versions": {"torch": "2.12"}}, "torch 2.11 and 2.12"),
        ({"encoder": {**ENCODER, "sha256": "d" * 64}}, f"sha256 {'e' * 64} and {'d' * 64}"),
        ({"test_images": "b" * 64}, f"fingerprint {'f' * 64} and {'b' * 64}"),
        ({"train_images": "b" * 64}, f"train_fingerprint {'a' * 64} and {'b' * 64}"),
        ({"bn_group": 1024}, "bn_group 2048 and 1024"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, changes, words):
    runs = [run_of_seed(tmp_path / "0", 0, 67.0), run_of_seed(tmp_path / "1", 1, 68.0, **changes)]
    with pytest.raises(ValueError, match=r"/0 and .*/1 measured imagenet1k/mae.* differ in more") as error:
        recorded(tmp_path, *runs)
    assert f"({words}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_where_a_run_was_made_is_none_of_its_settings(tmp_path):
    other = {"device": "GPU", "seconds": 2.0, "finished": "2025-02-01T12:00:00+00:00"}
    runs = [run_of_seed(tmp_path / "0", 0, 67.0),
            run_of_seed(tmp_path / "1", 1, 68.0, flags=["--num_workers", "3"], **other)]  # fmt: skip
    (record,) = recorded(tmp_path, *runs).values()
    assert [source["hardware"]["device"] for source in record["sources"]] == ["CPU", "GPU"]


def test_a_seed_counts_once(tmp_path):
    run = run_of_seed(tmp_path / "0", 0, 67.0)
    (record,) = recorded(tmp_path, run, run).values()  # the same run twice
    assert record["n"] == 1
    with pytest.raises(ValueError, match=r"several of these runs measured .* with seed 0: give one of them"):
        recorded(tmp_path, run, run_of_seed(tmp_path / "again", 0, 67.0))


def test_analyses_of_the_probes_of_several_seeds_are_joined_and_what_no_seed_decides_counts_once(tmp_path):
    def analysis(seed, of_pos=5.14):
        trained = {**probing(flags=["--seed", str(seed)]), "command": f"main_linprobe.py --seed {seed}"}
        result = aggregation(probes=trained)
        fixed, learned, _ = result["rules"]
        rules = [
            {**fixed, "entropy": {"mean": of_pos}},
            {**learned, "seed": seed, "entropy": {"mean": 4.8 + seed / 10}},
        ]
        result |= {"rules": rules, "localization": None}
        return put(tmp_path / f"{seed}-{of_pos}", "aggregation.json", result)

    found = {cell.head: record for cell, record in recorded(tmp_path, *map(analysis, (0, 1, 2))).items()}
    assert found["attn-mn"]["n"] == 1 and found["attn-mn"]["value"] == 5.14
    assert found["abmilp"]["n"] == 3 and found["abmilp"]["value"] == pytest.approx(4.9)
    assert [source["probes"]["command"] for source in found["abmilp"]["sources"]] == [
        f"main_linprobe.py --seed {seed}" for seed in range(3)
    ]
    with pytest.raises(ValueError, match="with different results: give one of them"):
        recorded(tmp_path, tmp_path / "0-5.14", analysis(1, 5.2))


EVERYTHING = ["weights", "order", "views"]


@pytest.mark.parametrize(
    ("changes", "varied"),
    [({}, ["weights"]), ({"seeds_vary": ["weights"]}, ["weights"]), ({"seeds_vary": EVERYTHING}, EVERYTHING)],
)
def test_record_says_what_its_seeds_vary(made, tmp_path, changes, varied):
    """Runs that do not say it are older than the field, and varied initial weights only."""
    trained = probing(**changes)
    assert made(trained)["cls"]["settings"]["seeds_vary"] == varied
    found = by_quantity(aggregation(probes=trained), tmp_path)
    assert found["aggregation_entropy", "abmilp"]["settings"]["seeds_vary"] == varied
    assert "seeds_vary" not in found["aggregation_entropy", "attn-mn"]["settings"]


def test_separate_runs_vary_everything(tmp_path):
    runs = [run_of_seed(tmp_path / str(seed), seed, top) for seed, top in ((0, 67.0), (1, 68.0))]
    (record,) = recorded(tmp_path, *runs).values()
    assert record["settings"]["seeds_vary"] == EVERYTHING


# ---------------------------------------------------------------------------------------------------------------------
# analyses
# ---------------------------------------------------------------------------------------------------------------------


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
    assert record["value"] == pytest.approx(5.05) and record["std"] is None and record["obstacles"] == []
    some = made(attention(images=1000), "attention.json")["cls"]
    assert some["obstacles"] == ["measured on 1,000 of 50,000 images"]


def test_mean_over_some_of_the_blocks_is_refused(made):
    result = attention()
    del result["metrics"]["cls_patch_entropy"]["blocks"][3]
    with pytest.raises(ValueError, match="cls_patch_entropy of 11 blocks, vit_base_patch16 has 12"):
        made(result, "attention.json")


def test_uniform_weights_stand_for_encoders_without_cls(made):
    record = made(attention(tokens=272, patches=256, registers=16, metrics={}), "attention.json")["pos"]
    assert record["value"] == math.log(256)


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
    return {(record["quantity"], record["head"]): record for record in program.records(path)}


def test_rules_are_recorded_over_their_seeds_and_localisation_calls_cls_attention_cls(tmp_path):
    found = by_quantity(aggregation(), tmp_path)
    assert set(found) == {
        ("aggregation_entropy", "attn-mn"), ("aggregation_entropy", "abmilp"), ("maxboxaccv2", "cls"),
        ("maxboxaccv2", "abmilp"),
    }  # fmt: skip
    assert found["aggregation_entropy", "abmilp"]["values"] == [4.8, 4.9]
    assert found["maxboxaccv2", "abmilp"]["seeds"] == [0, 1] and found["maxboxaccv2", "cls"]["value"] == 50.0
    assert all(record["obstacles"] == [] for record in found.values())


def test_what_is_wrong_with_the_probes_is_wrong_with_their_rules(tmp_path):
    found = by_quantity(aggregation(probes=probing(flags=["--epochs", "2"], n_train=100)), tmp_path)
    learned = found["aggregation_entropy", "abmilp"]["obstacles"]
    assert learned == ["probes trained on 100 images", "epochs 2, the paper's 90"]
    assert found["aggregation_entropy", "attn-mn"]["obstacles"] == []


def test_localisation_of_another_kind_is_an_obstacle(tmp_path):
    result = aggregation()
    result["localization"] |= {"transform": "crop", "step": 0.1}
    (crop, step) = by_quantity(result, tmp_path)["maxboxaccv2", "cls"]["obstacles"]
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
    found = read_ledger(tmp_path / "results", ["demo"])
    assert {(cell.quantity, cell.head, record["n"]) for cell, record in found.items()} == {
        ("top1", "cls", 2), ("top1", "abmilp-d2-relu", 2), ("aggregation_entropy_block_mean", "cls", 1),
        ("aggregation_entropy", "attn-mn", 1), ("aggregation_entropy", "abmilp-d2-relu", 2),
        ("maxboxaccv2", "cls", 1), ("maxboxaccv2", "abmilp-d2-relu", 2),
    }  # fmt: skip
    assert len({record["data"]["fingerprint"] for record in found.values()}) == 1
    assert all(record["obstacles"] == [] and record["data"]["n_test"] == 10 for record in found.values())


def test_a_sweep_over_seeds_is_one_record_as_the_launcher_makes_it(tmp_path):
    generate(tmp_path / "data", 20, 10, workers=1)
    launcher = cli.launcher.get_args_parser().parse_args(
        ["--job_dir", str(tmp_path / "sweep"), "--sweep", "seed", "0", "1", "2", "--ngpus", "0"]
    )
    words = ["--dataset", "demo", "--data_path", str(tmp_path / "data"), "--amp", "float32", "--num_workers", "0",
             "--model", "vit_demo_patch8", "--finetune", "demo/mae.safetensors", "--cls_features", "cls", "abmilp",
             "--batch_size", "10", "--epochs", "1", "--warmup_epochs", "0"]  # fmt: skip
    jobs = cli.launcher.plan(launcher, words)
    for job in jobs:
        main_linprobe.main(parse(main_linprobe.get_args_parser(), job.argv))
    program.main(Namespace(runs=[job.folder for job in jobs], results=tmp_path / "results", replace=False))
    found = read_ledger(tmp_path / "results", ["demo"])
    assert {cell.head for cell in found} == {"cls", "abmilp"}
    for record in found.values():
        assert record["n"] == 3 and record["std"] is not None and record["seeds"] == [0, 1, 2]
        assert [source["seed"] for source in record["sources"]] == [0, 1, 2]
        assert [source["log_sha256"] for source in record["sources"]] == [
            sha256(job.folder / "log.txt") for job in jobs
        ]
        assert datetime.fromisoformat(record["sources"][0]["finished"]).tzinfo is UTC
