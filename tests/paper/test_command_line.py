"""The experiment from its command line: killed and continued, shared by two processes, refused when it does not fit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paper.__main__ import device_of, main, open_results
from paper.protocol import TESTBED
from paper.sweep import jobs_of, key_of
from paper.world import world_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "testbed --tasks automata gratings land --images 24 --finetuning-steps 2 --realignment-steps 1 --blocks 2"
SMALL += " --conditions ideal sum_rate --subsets 2 --shots 1 --ablation both realigned --ablation-shots 2"
COMMAND = [*SMALL.split(), "--quiet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The file of an uninterrupted run, and where its fine-tuned vectors are."""
    folder = tmp_path_factory.mktemp("finished")
    path = main([*COMMAND, "--results", str(folder / "all.jsonl"), "--cache", str(folder / "cache")])
    return path, folder / "cache"


def start(path, cache, *more, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, *launcher, "-m", "paper", *COMMAND, "--results", str(path), "--cache", str(cache), *more]
    return subprocess.Popen(
        command, cwd=EXAMPLES, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_what_it_writes(finished):
    lines = [json.loads(line) for line in finished[0].read_text().splitlines()]
    assert lines[0]["protocol"]["tasks"] == ["automata", "gratings", "land"]
    rows = lines[1:]
    assert len({key_of(row) for row in rows}) == len(rows)
    accuracies = [row for row in rows if "accuracy" in row]
    assert {row["condition"] for row in accuracies} == {"base", "individual", "clean", "ideal", "sum_rate"}
    assert all(set(row["accuracy"]) == set(row["tasks"]) for row in accuracies)
    assert all(0 <= value <= 1 for row in accuracies for value in row["accuracy"].values())
    assert {len(row["tasks"]) for row in accuracies if row["condition"] == "clean"} == {2, 3}


@pytest.mark.slow
def test_killed_at_random_and_started_again(finished, tmp_path):
    path, cache = tmp_path / "killed.jsonl", finished[1]
    source, kills = random.Random(0), 0
    while kills < 6:
        process = start(path, cache)
        known = path.read_bytes().count(b"\n") if path.exists() else 0
        stop = known + source.randint(1, 6)
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= stop):
            time.sleep(0.005)
        time.sleep(source.random() * 0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert kills >= 2
    process = start(path, cache)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert path.read_bytes() == finished[0].read_bytes()


@pytest.mark.slow
def test_two_processes_under_torchrun(finished, tmp_path):
    path = tmp_path / "shared.jsonl"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = start(path, finished[1], launcher=launcher)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    expected, found = (sorted(file.read_text().splitlines()) for file in (finished[0], path))
    assert found == expected


def test_more_seeds_are_added_to_the_same_file(finished, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_bytes(finished[0].read_bytes())
    main([*COMMAND, "--results", str(path), "--cache", str(finished[1]), "--seeds", "0", "1", "--conditions", "ideal"])
    assert path.read_bytes().startswith(finished[0].read_bytes())
    added = [json.loads(line) for line in path.read_text().splitlines()][finished[0].read_text().count("\n") :]
    assert {row["seed"] for row in added} == {1}


def test_a_file_of_another_protocol_is_left_alone(finished, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_bytes(finished[0].read_bytes())
    with pytest.raises(SystemExit, match=r"another protocol: shots: expected 2, found 1"):
        main([*COMMAND, "--results", str(path), "--cache", str(finished[1]), "--shots", "2"])
    assert path.read_bytes() == finished[0].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "digits"], "tasks: expected at least two"),
        (["--tasks", "digits", "weather"], "tasks: unknown task 'weather'; the eight are digits"),
        (["--shots", "0"], "shots: expected at least 1"),
        (["--conditions", "rain"], "invalid choice: 'rain'"),
        (["--knows-jammer", "perhaps"], "expected yes or no"),
        (["--rule", "magic"], "rule: rmtllmf.taskvec has no rule 'magic'"),
        (["--model", "ViT-B-16"], "model: the testbed has one model of its own, got 'ViT-B-16'"),
        (["--device", "cuda"], "--device: the testbed has its own data, and runs on the CPU"),
        (["--parallel", "ddp"], "--parallel: the testbed has its own data"),
        (["clip", "--parallel", "ddp"], "--parallel: needs several processes; start it with torchrun"),
        (["clip", "--device", "abacus"], "device: torch knows no 'abacus'"),
        (
            ["--shots-from", "public", "--ablation-shots", "60"],
            "ablation_shots: expected at most 50 public ones, got 60",
        ),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*options, "--results", str(tmp_path / "none.jsonl")])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_few_samples_are_named(finished, tmp_path):
    arguments = [*COMMAND, "--results", str(tmp_path / "few.jsonl"), "--cache", str(finished[1]), "--shots", "9"]
    with pytest.raises(ValueError, match=r"shots: expected at least 9 samples of every class.* of 'automata'"):
        main(arguments)
    assert len((tmp_path / "few.jsonl").read_text().splitlines()) == 1  # before anything was calculated


def test_the_shipped_results_can_be_continued(tmp_path):
    """They are of this protocol, base model and code of the testbed, and hold the default jobs of five seeds."""
    path = EXAMPLES / "paper" / "testbed.jsonl"
    protocol = replace(TESTBED, seeds=(0, 1, 2, 3, 4))
    results = open_results(path, protocol, world_of(protocol, tmp_path, tmp_path))
    assert {job.key(protocol.tasks) for job in jobs_of(protocol)} <= {key_of(row) for row in results.rows()}


def test_processes_of_torchrun_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_of("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_of(said) for said in ("cuda", "cuda:0", "cpu", None)] == ["cuda:1", "cuda:0", "cpu", "cpu"]
