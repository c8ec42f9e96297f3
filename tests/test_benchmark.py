"""Contestants of the benchmarks do the same work; the chart shows the newest run of each."""

import csv

import pytest
import torch

from models_mae import MaskedAutoencoder
from models_vit import build_vit
from scripts import benchmark

CPU = torch.device("cpu")


def settings(name, **options):
    args = benchmark.get_args_parser().parse_args([name, "--model", "vit_demo_patch8", "--input_size", "32"])
    args.batch_size = 2
    for key, value in options.items():
        setattr(args, key, value)
    return args


def test_twins_have_the_same_parameters():
    """Of ViT-B and its published decoder."""
    with torch.device("meta"):
        model = MaskedAutoencoder(build_vit("vit_base_patch16"))
        twin = benchmark.hugging_face_twin(model, "sdpa")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())
    assert len(model.decoder_blocks) == len(twin.decoder.decoder_layers) == 8


def test_pretraining_steps_train_and_only_the_chosen_contestant_is_built():
    steps = benchmark.pretrain(settings("pretrain"), CPU)
    assert list(steps) == ["pretraining step", "Hugging Face, sdpa", "Hugging Face, eager"]
    for name, step in steps.items():
        losses = [float(step()) for _ in range(8)]
        assert losses[-1] < losses[0], name
    assert list(benchmark.pretrain(settings("pretrain", only="Hugging Face, sdpa"), CPU)) == ["Hugging Face, sdpa"]


def test_loaders_go_on_to_the_next_epoch(image_folder):
    contestants = benchmark.loader(settings("loader", data_path=image_folder, batch_size=10), CPU)
    assert len(contestants) == 6
    for name, batch in contestants.items():
        images = [batch()[0] for _ in range(5)]  # two to an epoch
        assert all(image.shape == (10, 3, 32, 32) and image.dtype == torch.float32 for image in images), name
        assert images[0].equal(images[2]) == name.endswith("test")
    with pytest.raises(ValueError, match="name a data set with --data_path"):
        benchmark.loader(settings("loader"), CPU)


@pytest.mark.parametrize("name", ["analysis", "bank"])
def test_timings_are_rows_of_the_output(tmp_path, name):
    path = tmp_path / "b.csv"
    args = settings(name, repeats=1, output=path, device="cpu", only="plain forward")
    benchmark.main(args)
    benchmark.main(args)
    rows = list(csv.DictReader(path.open()))
    assert [row["contestant"] for row in rows] == ["plain forward"] * 2 and rows[0]["speed_of_first"] == "1.0000"
    with pytest.raises(ValueError, match="--only nothing: choose"):
        benchmark.main(settings(name, device="cpu", only="nothing"))


HEAD = (
    "benchmark,contestant,images_per_second,speed_of_first,model,input_size,batch_size,amp,device,"
    "threads,commit,command\n"
)


def line(name, contestant, speed, batch=8, commit="a", command="c"):
    return f"{name},{contestant},10,{speed},vit,224,{batch},bfloat16,CPU,2,{commit},{command}\n"


def test_the_newest_run_of_each_benchmark_is_drawn(tmp_path):
    table = tmp_path / "b.csv"
    newer = [line("bank", "forward", 1, commit="b") + line("bank", "new", speed, commit="b") for speed in (0.8, 0.7)]
    older = line("bank", "forward", 1) + line("bank", "probe", 0.9)
    table.write_text(HEAD + older + line("bank", "forward", 1, batch=16) + line("loader", "pil", 1) + "".join(newer))
    runs = {
        (key[0], key[3]): [(r["contestant"], r["speed_of_first"]) for r in run]
        for key, run in benchmark.read_runs(table).items()
    }
    assert runs == {
        ("bank", "8"): [("forward", "1"), ("new", "0.7")],
        ("bank", "16"): [("forward", "1")],
        ("loader", "8"): [("pil", "1")],
    }
    benchmark.main(settings("plot", output=table, figure=tmp_path / "b.png"))
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_files_that_are_no_table_of_benchmarks_are_refused(tmp_path):
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    for name in ("b.csv", "none.csv"):
        with pytest.raises(ValueError, match=f"{name} is not a file that scripts/benchmark.py wrote"):
            benchmark.main(settings("plot", output=tmp_path / name, figure=tmp_path / "b.png"))
    with pytest.raises(ValueError, match="--output CSV"):
        benchmark.main(settings("plot"))
