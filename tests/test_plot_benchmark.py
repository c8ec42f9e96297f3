"""The chart of what was measured: the newest run of each benchmark, and nothing else."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import plot_benchmark

HEAD = (
    "benchmark,contestant,images_per_second,speed_of_first,model,input_size,batch_size,amp,device,"
    "threads,commit,command\n"
)


def line(benchmark, contestant, speed, batch=8, commit="a", command="c"):
    return f"{benchmark},{contestant},10,{speed},vit,224,{batch},bfloat16,CPU,2,{commit},{command}\n"


def test_the_newest_run_of_each_benchmark_is_drawn(tmp_path):
    table = tmp_path / "b.csv"
    table.write_text(
        HEAD + line("bank", "forward", 1) + line("bank", "probe", 0.9)
        + line("bank", "forward", 1, batch=16) + line("loader", "pil", 1)
        + line("bank", "forward", 1, commit="b") + line("bank", "new probe", 0.8, commit="b")
        + line("bank", "forward", 1, commit="b") + line("bank", "new probe", 0.7, commit="b")
    )  # fmt: skip
    rows = list(plot_benchmark.csv.DictReader(table.open()))
    runs = {
        (key[0], key[3]): [(r["contestant"], r["speed_of_first"]) for r in run]
        for key, run in plot_benchmark.newest(rows).items()
    }
    assert runs == {
        ("bank", "8"): [("forward", "1"), ("new probe", "0.7")], ("bank", "16"): [("forward", "1")],
        ("loader", "8"): [("pil", "1")],
    }  # fmt: skip
    args = plot_benchmark.get_args_parser().parse_args([str(table), "--output", str(tmp_path / "b.png")])
    plot_benchmark.main(args)
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_what_is_no_table_of_benchmarks_is_refused(tmp_path):
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    for words, message in (
        ([str(tmp_path / "b.csv")], "is not what scripts/benchmark.py writes"),
        ([str(tmp_path / "none.csv")], "none.csv is not what"),
        (["--benchmarks", "nothing"], "has no run of nothing"),
    ):
        args = plot_benchmark.get_args_parser().parse_args([*words, "--output", str(tmp_path / "b.png")])
        with pytest.raises(ValueError, match=message):
            plot_benchmark.main(args)
