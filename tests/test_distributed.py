"""Two processes do what one does: the same plan, the same weights, the same end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import distributed_jobs
import pytest
import torch
from pipelines import CONFIG
from safetensors.torch import load_file
from torch import Tensor

from compress import checkpoint, distributed, failures, manifest, shares
from compress.launch import Launch, launched

ROOT = Path(__file__).parents[1]
Runs = Mapping[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]


def processes(arguments: Sequence[str], folder: Path, size: int = 2) -> list[subprocess.Popen[str]]:
    """The same program `size` times, with what torchrun puts into the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(started: Sequence[subprocess.Popen[str]]) -> tuple[list[int], str, str]:
    """Exit codes, and what all of them said on stdout and on stderr."""
    found = [process.communicate(timeout=400) for process in started]
    codes = [process.returncode for process in started]
    return codes, "".join(out for out, _ in found), "".join(err for _, err in found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By job: what one process found, and what each of two found."""
    folder = tmp_path_factory.mktemp("two")
    started = processes([str(ROOT / "tests" / "distributed_jobs.py"), str(folder)], folder)
    alone = dict(distributed_jobs.results(tmp_path_factory.mktemp("one")))
    codes, _, said = ended(started)
    assert codes == [0, 0], said[-2000:]
    read = {
        name: [load_file(str(folder / f"{name}-{rank}.safetensors")) for rank in (0, 1)] for name in alone
    }
    return {name: (found, *read[name]) for name, found in alone.items()}  # type: ignore[misc]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest, over tensors of numbers, against the largest of the tensor."""
    assert a.keys() == b.keys()
    assert all(a[name].shape == b[name].shape for name in a)
    pairs = [(a[n].double(), b[n].double()) for n in a if a[n].numel()]
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-3)) for x, y in pairs)


# -- the minibatch is one -----------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["batch_norm", "batch_norm_graph"])
def test_batch_norm_over_uneven_shares_is_batch_norm_of_the_minibatch(runs: Runs, job: str) -> None:
    """Loss, all gradients and the running statistics in float64; in modules, and in the ops of a graph."""
    alone, first, second = runs[job]
    assert equal(first, second)
    assert len(alone) > 12
    assert difference(alone, first) < 1e-12


def test_without_it_the_statistics_are_of_the_share(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """The test above sees the difference that batch norm over one share makes."""
    monkeypatch.setattr(shares, "share", lambda batch: shares.Share(tuple(part[:3] for part in batch)))
    found = distributed_jobs.batch_norm(Path())
    assert difference(runs["batch_norm"][0], {k: v.detach() for k, v in found.items()}) > 1e-2


@pytest.mark.parametrize("job", ["prune", "prune_by_logits"])
def test_two_processes_prune_what_one_prunes(runs: Runs, job: str) -> None:
    """Batches of five and of one, a frozen layer that is scored, weights that began different."""
    alone, first, second = runs[job]
    assert torch.equal(alone["plan"], first["plan"])
    own = [{k: v for k, v in found.items() if k.startswith("dense/")} for found in (alone, first, second)]
    assert equal(own[1], own[2])
    assert difference(own[0], own[1]) < 1e-4
    assert torch.equal(first["plan"], second["plan"])


def test_the_first_process_reports_and_its_measure_counts(runs: Runs) -> None:
    alone, first, second = runs["prune"]
    assert first["seen"] == alone["seen"]
    assert second["seen"] == 0
    assert first["measured"].numel()
    assert torch.equal(second["measured"], torch.zeros_like(first["measured"]))
    alone, first, second = runs["own_measure"]
    assert difference(alone, first) < 1e-4
    assert first["best"].tolist() == pytest.approx([2, 0.3])
    assert equal(first, second)


def test_training_on_augmented_images_is_the_same(runs: Runs) -> None:
    """Each process decodes its share; crops and mirrors are those of one process, and so are the results."""
    alone, first, second = runs["classify"]
    assert equal(first, second)
    assert torch.equal(alone["correct"], first["correct"])
    assert difference(alone, first) < 1e-4


def test_gradients_of_every_kind_are_summed(runs: Runs) -> None:
    _, first, second = runs["gradients"]
    assert equal(first, second)
    assert {name: set(t.flatten().tolist()) for name, t in first.items()} == {
        "torch.float32": {3.0}, "torch.float64": {3.0}, "torch.complex64": {3.0}, "torch.bfloat16": {3.0},
        "some": {5.0},
    }  # fmt: skip


def test_lists_of_examples_are_shared_and_what_cannot_be_is_refused(runs: Runs) -> None:
    alone, first, second = runs["lists"]
    assert torch.equal(alone["own"], torch.cat([first["own"], second["own"]]))
    assert (len(first["own"]), len(second["own"])) == (2, 3)
    assert float(first["weight"] + second["weight"]) == pytest.approx(1)
    assert bytes(first["differs"].tolist()).decode() == (
        "torchrun: the first batch differs between the processes; "
        "give whole batches, the same in each: no DistributedSampler, no random choice without a seed"
    )
    assert bytes(first["said"].tolist()).decode() == (
        "batches: a batch of tensors of lengths 4, 5 cannot be shared among 2 processes; "
        "give tensors of one length, or lists with an item for each example"
    )


def test_running_statistics_of_one_share_are_those_of_the_first(runs: Runs) -> None:
    _, first, second = runs["norms_of_instances"]
    assert equal(first, second)


# -- one writer, one stop -----------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["resumed_training", "resumed_pruning"])
def test_a_stop_asked_of_one_stops_all_and_they_go_on_to_the_same_bits(runs: Runs, job: str) -> None:
    """With dropout, which draws differently in each. Process 1 has a `checkpoint.save` that fails."""
    _, first, second = runs[job]
    assert equal(first, second)
    whole = {k.partition("/")[2]: v for k, v in first.items() if k.startswith("whole/")}
    stopped = {k.partition("/")[2]: v for k, v in first.items() if k.startswith("stopped/")}
    assert len(whole) > 10
    assert equal(whole, stopped)


def test_both_stopped_at_the_same_step(runs: Runs) -> None:
    for found in runs["resumed_training"]:
        assert bytes(found["said"].tolist()).decode() == "train: stopped at epoch 1, step 3 of 5"


# -- one process --------------------------------------------------------------------------------------


def test_one_process_shares_nothing_and_changes_no_bit() -> None:
    batch = distributed_jobs.examples(5, 0)
    share = shares.share(batch)
    assert share.batch is batch
    assert (share.weight, share.split) == (1.0, False)
    assert (distributed.size(), distributed.rank(), distributed.any_of(True)) == (1, 0, True)
    loss = torch.tensor(0.1, requires_grad=True)
    share.backward(loss)
    assert loss.grad == 1.0
    assert share.mean(loss) == float(loss.detach())


def test_only_the_whole_environment_of_torchrun_counts() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert launched(env) == Launch(3, 8, 1)
    for name in env:
        assert launched({k: v for k, v in env.items() if k != name}) == Launch()
    assert launched({**env, "RANK": "x"}) == Launch()


def test_what_torchrun_sends_on_is_no_second_press(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's Ctrl-C reaches the processes, and torchrun sends it to them once more."""
    monkeypatch.setattr(failures, "launched", lambda: Launch(0, 2, 0))
    said: list[str] = []
    with failures.Stopper(said.append) as stopper:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert (stopper.code, len(said)) == (130, 1)
        monkeypatch.setattr(failures, "ONE_PRESS_SECONDS", 0.0)
        with pytest.raises(failures.StopNow):
            signal.raise_signal(signal.SIGINT)


# -- the command --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_config_is_told_once_and_all_end_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(CONFIG.replace("macs_ratio", "mac_ratio"))
    codes, out, err = ended(processes(["-m", "compress", "run"], tmp_path))
    assert codes == [3, 3]
    assert out == ""
    assert err.count("mac_ratio") == 1
    assert "Traceback" not in err


def torchrun(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compress"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_whole_run_under_torchrun_removes_what_one_process_removes(tmp_path: Path) -> None:
    """From the same trained model: in training from nothing, rounding grows until another plan is best."""
    (tmp_path / "compress.yaml").write_text(CONFIG)
    alone = subprocess.run(
        [sys.executable, "-m", "compress", "run", "--until", "prune", "--out", "alone", "-qq"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=500,
    )  # fmt: skip
    assert alone.returncode == 0
    shutil.copytree(tmp_path / "alone", tmp_path / "run")
    code, out, err = torchrun(tmp_path, "run", "--json", "--from", "prune", "--set", "gates.speedup=1000")
    assert code == 1  # torchrun's own, for any failure: the gate's is in its table
    assert json.loads(out)["exit_code"] == 5
    assert len(re.findall(r"^done +prune", err, re.MULTILINE)) == 1
    assert set(re.findall(r"exitcode +: (\d+)", err)) <= {"5"}
    assert not manifest.verify(tmp_path / "run")
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("run", "alone")]
    assert plans[0] == plans[1]
    weights = [load_file(str(tmp_path / name / "pruned.safetensors")) for name in ("run", "alone")]
    assert difference(*weights) < 1e-2


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(CONFIG)
    command = ["-m", "compress", "run", "--until", "finetune", "--set", "train.epochs=40"]
    started = processes(command, tmp_path)
    record = tmp_path / "run" / "checkpoints" / "train" / "a.json"
    until = time.monotonic() + 200
    while not record.exists() and time.monotonic() < until:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGINT)
    codes, _, err = ended(started)
    assert codes == [130, 130]
    assert err.count("stopped at epoch") == 1
    assert checkpoint.load(record.parent) is not None
    shorter = ["-m", "compress", "run", "--until", "prune", "--set", "train.epochs=40"]
    codes, _, err = ended(processes(shorter, tmp_path))
    assert codes == [0, 0]
    assert err.count("going on from epoch") == 1


FAILS = """
import os
import torch
def data():
    images, labels = torch.arange(64 * 784.0).reshape(64, 1, 28, 28) % 7, torch.arange(64) % 10
    return {"train": Examples(images, labels), "test": (images[:16], labels[:16])}
class Examples:
    def __init__(self, *parts):
        self.parts = parts
    def __len__(self):
        return 64
    def __getitem__(self, i):
        if os.environ["RANK"] == "1" and i == 7:
            raise OSError("the disk is broken")
        return tuple(part[i] for part in self.parts)
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(CONFIG)
    (tmp_path / "broken.py").write_text(FAILS)
    changes = ["data={name: broken:data, batch_size: 16}", "train.epochs=30"]
    command = ["-m", "compress", "run", *(part for change in changes for part in ("--set", change))]
    codes, _, err = ended(processes(command, tmp_path))
    assert codes == [3, 3]
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "example 7 cannot be read: OSError: the disk is broken" in lines[0]
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_process_that_is_killed_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(CONFIG)
    started = processes(["-m", "compress", "run", "--set", "train.epochs=4000"], tmp_path)
    until = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoints/train/*.json")) and time.monotonic() < until:
        time.sleep(0.1)
    started[1].kill()
    codes, _, err = ended(started)
    assert codes == [7, -signal.SIGKILL]
    assert err.splitlines()[-1] == (
        "error: torchrun: another process of this run has ended, or is silent; "
        "see what it said; the same command goes on from the last checkpoint"
    )
