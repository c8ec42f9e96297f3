"""The launcher and its jobs, as far as they need no SLURM: scripts, arguments, the copy of the code, the rendezvous."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import submitit

import submitit_linprobe as launcher
from cli.launcher import PROGRAMS
from runtime import jobs
from runtime.folder import RunFolder
from runtime.provenance import ROOT, code_version, take_snapshot
from util import signals
from util.distributed import PeerLost
from util.rendezvous import rendezvous_port, slurm_environment
from util.signals import EXIT_STOPPED


@pytest.fixture
def words(image_folder, tmp_path):
    return [
        "--job_dir", str(tmp_path / "run"), "--data_path", str(image_folder), "--model", "vit_demo_patch8",
        "--finetune", "demo/mae.safetensors",
    ]  # fmt: skip


def dry_run(capsys, *words):
    launcher.main(launcher.command_line([*words, "--dry_run"]))
    return capsys.readouterr().out


# ---- what is submitted


def test_a_dry_run_prints_the_script_and_the_command_and_leaves_nothing(words, tmp_path, capsys):
    text = dry_run(
        capsys, *words, "--ngpus", "4", "--nodes", "2", "--partition", "gpu", "--account", "me", "--qos", "low",
        "--constraint", "a100", "--mem_gb", "64", "--timeout", "60", "--comment", "of mine", "--slurm", "exclude=n3",
    )  # fmt: skip
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=10", "--partition=gpu",
        "--mem=65536M", "--account=me", "--qos=low", "--constraint=a100", "--comment='of mine'", "--exclude=n3",
        "--time=60", "--requeue", "--signal=USR2@120", "--job-name=main_linprobe",
        f"--output={tmp_path}/run/jobs/%j_0_log.out",
    } <= set(options)  # fmt: skip
    assert f"--output_dir {tmp_path}/run --resume auto" in text.splitlines()[-1]
    assert f"PYTHONPATH={tmp_path}/run/code/" in text and list(tmp_path.iterdir()) == []


def test_without_gpus_a_job_asks_for_none_and_computes_on_the_cpu(words, capsys):
    text = dry_run(capsys, *words, "--ngpus", "0", "--tasks_per_node", "3")
    assert "--gpus" not in text and "--ntasks-per-node=3" in text and "--device cpu" in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_can_be_a_job_that_resumes(program, words, capsys):
    if program == "main_pretrain":
        words = words[:-2]
    text = dry_run(capsys, "--main", program, *words)
    assert f"python {program}.py" in text
    assert "--resume auto" in text


def test_a_sweep_is_an_array_of_jobs_with_folders_of_their_own(words, tmp_path, capsys):
    text = dry_run(
        capsys, *words, "--sweep", "seed", "0", "1", "--sweep", "lr,blr", "1,0.1", "2,0.2", "--parallel", "2"
    )
    assert "#SBATCH --array=0-3%2" in text and "%A_%a_0_log.out" in text
    commands = [line for line in text.splitlines() if line.startswith("# every process")]
    assert f"--output_dir {tmp_path}/run/seed=1_lr,blr=2,0.2 " in commands[3]
    assert commands[3].endswith("--seed 1 --lr 2 --blr 0.2")


@pytest.mark.parametrize(
    "more, told",
    [
        (["--data_path", "absent"], "--data_path absent: there is no such folder"),
        (["--finetune", "absent.pth"], "--finetune absent.pth: no such file"),
        (["--finetune", "mae_vit_base_patch16"], "is no vit_demo_patch8: write --model vit_base_patch16"),
        (["--model", "vit_absent"], "vit_absent"),
        (["--dataset", "absent"], "unknown data set"),
        (["--output_dir", "elsewhere"], "the run folder is --job_dir"),
        (["--timeout", "2"], "--timeout 2: must exceed 120 seconds"),
        (["--cluster", "local", "--nodes", "2"], "--nodes 2: --cluster local is this one machine"),
        (["--job_dir", "runs/%j"], "SLURM replaces %"),
        (["--sweep", "seed"], "--sweep seed: write the values"),
        (["--sweep", "seed", "1", "1"], "write every value once"),
        (["--sweep", "model,finetune", "a"], "names 2 flags and 1 values"),
        (["--slurm", "exclusive"], "write NAME=VALUE"),
        (["--finetune", "https://me:SECRET@host/w.pth?t=SECRET"], "https://host/w.pth: the job would keep this URL's"),
    ],
)
def test_what_cannot_run_is_refused_at_submission(more, told, words, capsys):
    with pytest.raises(ValueError, match=told):
        dry_run(capsys, *words, *more)


def test_an_unknown_flag_is_one_line(words, capsys):
    with pytest.raises(SystemExit):
        dry_run(capsys, *words, "--epoch", "3")
    assert "--epoch: unknown; did you mean --epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dry_run(capsys, *words, "--partitio", "gpu")  # the launcher's own are among those to be meant
    assert "--partitio: unknown; did you mean --partition? --help" in capsys.readouterr().err


def test_files_of_the_nodes_may_be_out_of_sight(words, capsys):
    dry_run(capsys, *words, "--data_path", "/of/the/nodes", "--finetune", "/of/the/nodes.pth", "--remote_paths")


def test_another_run_in_the_folder_is_refused(words, tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.write("args.json", {"args": {"epochs": 7}})
    folder.save_checkpoint(0, {})
    with pytest.raises(ValueError, match=r"epochs was 7, is 90.*name another --job_dir"):
        dry_run(capsys, *words)


# ---- the copy of the code


def test_a_snapshot_is_the_code_as_it_is_now_and_is_made_once(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    committed = ("main_a.py", "util/__init__.py", "util/b.py", "tests/test_a.py", "results/figure.png")
    for name in (*committed, "runs/code/1/main_a.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("committed")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "main_a.py", "util", "tests", "results"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (root / "main_a.py").write_text("changed since")
    (root / "util" / "new.py").write_text("git does not know it")
    monkeypatch.setattr("runtime.provenance.ROOT", root)
    copy = take_snapshot(tmp_path / "code")
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert found == {"main_a.py", "util/__init__.py", "util/b.py", "util/new.py", "snapshot.json"}
    assert (copy / "main_a.py").read_text() == "changed since"
    record = json.loads((copy / "snapshot.json").read_text())
    assert record["dirty"] is True and len(record["commit"]) == 40
    assert take_snapshot(tmp_path / "code") == copy
    (root / "main_a.py").write_text("changed again")
    assert take_snapshot(tmp_path / "code") != copy and (copy / "main_a.py").read_text() == "changed since"
    monkeypatch.setattr("runtime.provenance.ROOT", copy)
    assert code_version() == record  # what a run from the copy says of itself


# ---- processes

STEP = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04,7]-a,login1",
}  # fmt: skip


def test_processes_of_srun_find_each_other():
    assert slurm_environment(STEP) == {
        "MASTER_ADDR": "gpu03-a", "MASTER_PORT": str(rendezvous_port(12, 1)), "RANK": "5", "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
    }  # fmt: skip
    for nodes, first in (("n1", "n1"), ("a-[1,3]", "a-1"), ("r[1-2]n[07-09],x", "r1n07"), ("x,y[1-2]", "x")):
        assert slurm_environment({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first
    assert slurm_environment({**STEP, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS is set but SLURM_PROCID is not"):
        slurm_environment({name: value for name, value in STEP.items() if name != "SLURM_PROCID"})
    with pytest.raises(ValueError, match="must be integers"):
        slurm_environment({**STEP, "SLURM_STEP_NUM_TASKS": "x"})
    assert len({rendezvous_port(job, step) for job in range(1000, 1010) for step in range(3)}) == 30


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8"},  # the shell of salloc
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # its interactive step
        {**STEP, "SLURM_PTY_PORT": "38959"},  # srun --pty
    ],
)
def test_one_process_in_an_allocation_waits_for_no_others(environment):
    assert slurm_environment(environment) == {}


def test_the_task_is_read_before_signals_are_taken_so_it_imports_little():
    code = "import sys, runtime.jobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- the end of a job


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """stopped(signal, state, rank): whether a process that was stopped puts its job back into the queue."""

    def stop(number, known="RUNNING", rank=0, cluster="slurm"):
        requeued = []
        job = SimpleNamespace(name=lambda: cluster, job_id="12", global_rank=rank, num_tasks=2, USR_SIG="USR2")
        monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
        monkeypatch.setattr(jobs, "state_of", lambda job_id: known)
        monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
        before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
        signal.signal(signal.SIGUSR2, lambda *_: requeued.append(True))
        try:
            with pytest.raises(SystemExit) as end:
                jobs.come_back(job, signals.Stopped(number))
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
        assert end.value.code == EXIT_STOPPED
        return bool(requeued)

    return stop


def test_a_job_goes_back_into_the_queue_where_slurm_only_warned_it(stopped, tmp_path):
    assert stopped(signal.SIGUSR2) and stopped(signal.SIGTERM)
    assert not stopped(signal.SIGTERM, "COMPLETING")  # pre-empted, which SLURM sees to, or cancelled by its user
    assert not stopped(signal.SIGUSR2, rank=1)  # the first process does it for all
    assert not stopped(signal.SIGINT)
    assert stopped(signal.SIGUSR2, cluster="local") and not stopped(signal.SIGTERM, cluster="local")
    (tmp_path / "12_1_result.pkl").touch()
    assert not stopped(signal.SIGTERM)  # another process failed, and SLURM ends the rest


def test_the_rank_that_reports_a_lost_one_puts_the_job_back(monkeypatch):
    """Rank 0 may be the lost one."""
    calls, job = [], SimpleNamespace(job_id="12", global_rank=1)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(jobs.subprocess, "run", lambda command, **options: calls.append(command))
    before = signal.getsignal(signal.SIGTERM)
    for reported_here in (True, False):
        with pytest.raises(SystemExit) as end:
            jobs.replace_lost_ranks(job, PeerLost("rank 0 does not answer", False, reported_here))
        assert end.value.code == EXIT_STOPPED
    signal.signal(signal.SIGTERM, before)
    assert calls == [["scontrol", "requeue", "12"]]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "20")
    with pytest.raises(jobs.JobFailed):
        jobs.replace_lost_ranks(job, PeerLost("rank 0 does not answer", False))


def test_a_question_that_the_signal_of_a_cancellation_ends_is_asked_again(tmp_path, monkeypatch):
    """Else a job that its user has just cancelled would count as running, and be put back."""
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; kill $$; }}\necho COMPLETING\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert jobs.state_of("12") == "COMPLETING"
    (tmp_path / "squeue").write_text("#!/bin/sh\nkill $$\n")
    assert jobs.state_of("12") is None


def test_what_goes_back_into_the_queue_is_the_same_again():
    task = jobs.Task("main_analyze_attention", ["--resume", "auto"])
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function == task


def test_the_report_of_a_failure_is_the_program_s_line(tmp_path):
    job = submitit.SlurmJob(tmp_path, "12", tasks=[0, 1])
    for rank, (outcome, line) in enumerate(
        [("error", "rank 1 has ended, while rank 0 waits"), ("error", "cannot read image")]
    ):
        paths = job.task(rank).paths
        submitit.core.utils.cloudpickle_dump((outcome, line), paths.result_pickle)
        paths.stdout.write_text(
            f"main_linprobe.py: {line}\nsubmitit ERROR - Submitted job\nsrun: error: task 1: Exited\n"
        )
    assert (
        launcher.failure(job) == f"the last lines of {tmp_path}/12_1_log.out:\n    main_linprobe.py: cannot read image"
    )
