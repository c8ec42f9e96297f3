"""On a real SLURM, three nodes on one machine: what interrupts a job does not change its result; what ends it is named.

    python -m pytest -m slurm tests/test_slurm.py

tests/slurm/cluster.sh installs it and starts it; without root, or where that fails, these tests are skipped.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from interruptions import ENVIRONMENT, ROOT, differences, outcome

import submitit_linprobe as launcher
from cli.console import run_main
from data_sets.demo import generate

pytestmark = pytest.mark.slurm
CLUSTER = ["bash", str(ROOT / "tests" / "slurm" / "cluster.sh")]
EPOCHS = 12


@pytest.fixture(scope="module")
def slurm():
    """The environment of SLURM's users."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        for command in (["install"], ["start", folder]):
            done = subprocess.run([*CLUSTER, *command], capture_output=True, text=True, timeout=600)
            if done.returncode == 77:
                pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stderr
        try:
            yield {**ENVIRONMENT, "SLURM_CONF": f"{folder}/slurm.conf"}
        finally:
            subprocess.run([*CLUSTER, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 160, 40, workers=1)
    return folder


@pytest.fixture(scope="module")
def command(data):
    """Flags of a probing run of several optimizer steps an epoch, with two processes."""
    return [
        "--data_path", data, "--model", "vit_demo_patch8", "--finetune", ROOT / "demo" / "mae.safetensors",
        "--cls_features", "cls", "abmilp", "--blr", "3", "--batch_size", "10", "--epochs", EPOCHS,
        "--warmup_epochs", "1", "--amp", "float32", "--input_size", "32", "--device", "cpu", "--num_workers", "0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(slurm, command, tmp_path_factory):
    """The uninterrupted run, which srun starts without any launcher."""
    folder = tmp_path_factory.mktemp("whole")
    call(slurm, "srun", "--ntasks", 2, sys.executable, ROOT / "main_linprobe.py", *command, "--output_dir", folder)
    return outcome(folder)


def call(slurm, *words, check=True):
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def hangs(*_):
    raise AssertionError("the launcher does not end")


def launch(slurm, folder, *words, check=True):
    """Output of the launcher, and the job's number. It runs in this process, which has imported everything already."""
    argv = ["--job_dir", folder, "--ngpus", 0, "--cpus_per_task", 1, *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(ROOT)
        for name, value in slurm.items():
            patch.setenv(name, value)
        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(300)
        try:
            run_main(launcher.main, launcher.command_line(list(map(str, argv))))
        except SystemExit as end:
            code = end.code
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    done = subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
    assert code == 0 or not check, done.stdout + done.stderr
    number = re.search(r"^job (\d+)", done.stdout, re.M)
    return done, number and number[1]


def shown(slurm, job, field):
    return re.search(rf"\b{field}=(\S+)", call(slurm, "scontrol", "show", "job", job).stdout)[1]


def until(condition, log, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        text = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < end and "Exited with exit code 1" not in text, text
        time.sleep(0.1)


def epochs(folder):
    log = folder / "log.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def interrupt(slurm, job, folder, how):
    """Wait until the job has come on since its last start, interrupt it, and wait until it is back in the queue."""
    log, restarts, before = folder / "jobs" / f"{job}_0_log.out", int(shown(slurm, job, "Restarts")), epochs(folder)
    until(lambda: epochs(folder) > before + 1, log)
    how()
    until(lambda: int(shown(slurm, job, "Restarts")) == restarts + 1, log)


def preempt(slurm):
    """A short job that needs the whole machine, and goes first."""
    call(slurm, "sbatch", "--partition", "high", "--exclusive", "--output", "/dev/null", "--wrap", "sleep 1")


def test_a_job_that_is_preempted_twice_ends_with_the_result_of_the_uninterrupted_run(slurm, command, whole, tmp_path):
    folder = tmp_path / "run"
    _, job = launch(slurm, folder, "--tasks_per_node", 2, "--partition", "low", *command)
    for _ in range(2):
        interrupt(slurm, job, folder, lambda: preempt(slurm))
    log = folder / "jobs" / f"{job}_0_log.out"
    until(lambda: shown(slurm, job, "JobState") == "COMPLETED", log)
    text = log.read_text()
    assert text.count("stopped by SIGTERM: saved after") == 2 and text.count("resuming from") == 2, text
    assert text.count("SLURM goes on with it") == 2, text
    assert differences(outcome(folder), whole) == []


def test_two_nodes_are_one_node_of_two_processes(slurm, command, whole, tmp_path):
    nodes = ["--partition", "nodes", "--nodes", 2, "--ntasks", 2]
    call(slurm, "srun", *nodes, sys.executable, ROOT / "main_linprobe.py", *command, "--output_dir", tmp_path / "run")
    assert differences(outcome(tmp_path / "run"), whole) == []


def on_node(name):
    """Ranks on a node, and what has started them."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={name}".encode() in environ.read_bytes().split(b"\0"):
                yield from (int(environ.parent.name), int((environ.parent / "stat").read_text().split()[-49]))


def test_a_job_whose_node_hangs_goes_on_with_another_node(slurm, command, whole, tmp_path):
    folder, lost = tmp_path / "run", "127.0.0.3"
    flags = ["--partition", "nodes", "--nodes", 2, "--tasks_per_node", 1, "--dist_timeout", 60, 5, 20]
    _, job = launch(slurm, folder, *flags, *command)
    log = folder / "jobs" / f"{job}_0_log.out"
    until(lambda: epochs(folder) > 1, log)
    daemon = int(Path(slurm["SLURM_CONF"]).with_name(f"slurmd-{lost}.pid").read_text())
    frozen = {daemon, *on_node(lost)} - {1}
    for process in frozen:
        os.kill(process, signal.SIGSTOP)
    try:
        until(lambda: shown(slurm, job, "JobState") == "COMPLETED", log)
    finally:
        for process in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT if process == daemon else signal.SIGKILL)
    assert shown(slurm, job, "NodeList") == "127.0.0.[2,4]" and int(shown(slurm, job, "Restarts")) > 0
    text = log.read_text()
    assert "rank 1 (last heard at" in text and "goes back into the queue" in text and "resuming from" in text, text
    assert differences(outcome(folder), whole) == []


def test_a_timeout_and_a_preemption_with_grace_requeue_the_job_themselves(slurm, command, whole, tmp_path):
    """SLURM only warns the job, which has to put itself back: submitit does, once it is saved."""
    folder = tmp_path / "run"
    _, job = launch(slurm, folder, "--tasks_per_node", 2, "--partition", "patient", *command)

    def time_out():
        """SLURM looks every 30 seconds; the run stands still meanwhile, or it would be over."""
        call(slurm, "scancel", "--signal", "STOP", job)
        call(slurm, "scontrol", "update", f"JobId={job}", "TimeLimit=1")
        end = time.monotonic() + 35
        while time.monotonic() < end and shown(slurm, job, "Restarts") == "0":
            time.sleep(0.5)
        if shown(slurm, job, "Restarts") == "0":
            call(slurm, "scancel", "--signal", "CONT", job, check=False)

    interrupt(slurm, job, folder, time_out)
    call(slurm, "scontrol", "update", f"JobId={job}", "TimeLimit=60")
    interrupt(slurm, job, folder, lambda: preempt(slurm))
    log = folder / "jobs" / f"{job}_0_log.out"
    until(lambda: shown(slurm, job, "JobState") == "COMPLETED", log)
    text = log.read_text()
    for name in ("SIGUSR2", "SIGTERM"):
        assert text.count(f"stopped by {name}: saved after") == 1, text
    assert text.count("goes back into the queue") == 2 and text.count("resuming from") == 2, text
    assert differences(outcome(folder), whole) == []


def test_a_cancelled_job_is_saved_and_does_not_come_back(slurm, command, tmp_path):
    folder = tmp_path / "run"
    _, job = launch(slurm, folder, *command, "--epochs", 500)
    log = folder / "jobs" / f"{job}_0_log.out"
    until(lambda: epochs(folder) > 0, log)
    call(slurm, "scancel", job)
    until(lambda: shown(slurm, job, "JobState") == "CANCELLED", log)
    assert log.read_text().count("stopped by SIGTERM: saved after") == 1
    assert shown(slurm, job, "Restarts") == "0"


def test_a_job_that_crashes_reports_its_error(slurm, command, data, tmp_path):
    broken = tmp_path / "data"
    subprocess.run(["cp", "-r", data, broken], check=True)
    bad = next((broken / "train").rglob("*.png"))
    bad.write_bytes(b"no image")
    folder = tmp_path / "run"
    done, job = launch(slurm, folder, "--tasks_per_node", 2, "--wait", *command, "--data_path", broken, check=False)
    assert done.returncode == 1
    assert f"job {job}: FAILED" in done.stdout
    assert f"main_linprobe.py: cannot read image {bad}" in done.stderr, done.stderr
    assert str(folder / "jobs" / f"{job}_") in done.stderr
    assert "Traceback" not in done.stderr


def test_what_slurm_refuses_is_one_line_and_leaves_no_files(slurm, command, tmp_path):
    done, _ = launch(slurm, tmp_path / "run", "--partition", "absent", *command, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "invalid partition" in done.stderr, done.stderr
    assert list((tmp_path / "run" / "jobs").iterdir()) == []


@pytest.mark.parametrize("sweep", [[], ["--sweep", "seed", "0", "1"]])
def test_the_script_of_a_dry_run_is_accepted(slurm, command, sweep, tmp_path):
    done, _ = launch(slurm, tmp_path / "run", "--dry_run", "--mem_gb", "1", "--comment", "two words", *sweep, *command)
    assert not (tmp_path / "run").exists()
    (tmp_path / "script.sh").write_text(done.stdout)
    accepted = call(slurm, "sbatch", "--test-only", tmp_path / "script.sh", check=False)
    assert accepted.returncode == 0 and "to start at" in accepted.stderr, accepted.stderr


def test_a_sweep_over_seeds_is_an_array_with_a_folder_for_each(slurm, command, tmp_path):
    done, job = launch(
        slurm, tmp_path / "run", "--sweep", "seed", 0, 1, "--wait", *command, "--epochs", 1, "--warmup_epochs", 0
    )
    for index in range(2):
        assert f"job {job}_{index}: COMPLETED" in done.stdout
        assert (tmp_path / "run" / f"seed={index}" / "results.json").exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"seed=0", "seed=1", "jobs", "code"}
    assert not list(tmp_path.rglob("*%*"))
    assert (tmp_path / "run" / "jobs" / f"{job}_1_0_log.out").exists() and os.listdir(tmp_path / "run" / "code")
