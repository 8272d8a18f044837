"""Training stopped, killed or damaged anywhere goes on to the same bits; checkpoints outlive damage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from safetensors.torch import save_file
from small_training import (
    STEPS,
    StopAfter,
    assert_same,
    digits,
    facts,
    hard,
    net,
    small_task,
    uninterrupted,
    weights,
)
from torch import Tensor

from compress import checkpoint as disk
from compress import files
from compress.config import DistillConfig
from compress.errors import IntegrityError, Interrupted, ResourceError
from compress.train import train


class TestResume:
    @pytest.mark.parametrize(("optimizer", "ema"), [("sgd", 0.0), ("adamw", 0.0), ("sgd", 0.9)])
    def test_stopped_at_every_kind_of_step(self, tmp_path: Path, optimizer: str, ema: float) -> None:
        config = hard(optimizer=optimizer, ema=ema, distill=DistillConfig())
        expected, expected_facts = uninterrupted(config, teacher=net(8))
        for stop in (0, 1, 4, STEPS, STEPS + 1, 2 * STEPS - 1, 3 * STEPS - 1):
            folder = tmp_path / str(stop)
            with pytest.raises(Interrupted) as caught:
                train(
                    net(),
                    small_task(),
                    config,
                    seed=4,
                    teacher=net(8),
                    checkpoint=folder,
                    should_stop=StopAfter(stop),
                )
            assert caught.value.exit_code == 130
            assert f"step {stop % STEPS} of {STEPS}" in str(caught.value)
            model = net()
            torch.manual_seed(stop)  # the state of the caller's generators must not matter
            result = train(model, small_task(), config, seed=4, teacher=net(8), checkpoint=folder)
            assert_same(weights(model), expected)
            assert facts(result) == expected_facts

    def test_stopped_after_every_step(self, tmp_path: Path) -> None:
        config = hard()
        expected, expected_facts = uninterrupted(config)
        stops = 0
        while True:
            model = net()
            try:
                result = train(
                    model, small_task(), config, seed=4, checkpoint=tmp_path, should_stop=StopAfter(1)
                )
                break
            except Interrupted:
                stops += 1
        assert stops == 3 * STEPS - 1
        assert_same(weights(model), expected)
        assert facts(result) == expected_facts

    def test_checkpoints_do_not_change_the_result(self, tmp_path: Path) -> None:
        config = hard()
        expected, expected_facts = uninterrupted(config)
        found, found_facts = uninterrupted(config, checkpoint=tmp_path, checkpoint_seconds=0.0)
        assert_same(found, expected)
        assert found_facts == expected_facts
        messages: list[str] = []
        again, again_facts = uninterrupted(
            config, checkpoint=tmp_path, progress=lambda p: messages.append(p.message)
        )
        assert_same(again, expected)  # nothing left to do
        assert again_facts == expected_facts
        assert messages == []

    def test_data_that_draw_from_the_global_generators_do_not_move_the_dropout(self, tmp_path: Path) -> None:
        def batches(epoch: int, start: int) -> Any:
            torch.rand(5)  # as a DataLoader does when it starts
            yield from small_task().train_batches(epoch, start)

        config = hard(epochs=2)
        expected, _ = uninterrupted(config)
        task = replace(small_task(), train_batches=batches)
        with pytest.raises(Interrupted):
            train(net(), task, config, seed=4, checkpoint=tmp_path, should_stop=StopAfter(STEPS + 3))
        model = net()
        train(model, task, config, seed=4, checkpoint=tmp_path)
        assert_same(weights(model), expected)

    def test_noise_of_each_batch_is_the_same_again(self, tmp_path: Path) -> None:
        def batches(epoch: int, start: int) -> Any:
            for images, labels in small_task().train_batches(epoch, start):
                yield images + 0.1 * torch.randn_like(images), labels

        def run(**given: Any) -> dict[str, Tensor]:
            model = net()
            train(model, replace(small_task(), train_batches=batches), hard(epochs=2), seed=4, **given)
            return weights(model)

        with pytest.raises(Interrupted):
            run(checkpoint=tmp_path, should_stop=StopAfter(STEPS + 3))
        assert_same(run(checkpoint=tmp_path), run())

    def test_the_message_says_where_it_goes_on(self, tmp_path: Path) -> None:
        with pytest.raises(Interrupted, match="run the same command again"):
            train(net(), small_task(), hard(), checkpoint=tmp_path, should_stop=StopAfter(STEPS + 2))
        messages: list[str] = []
        train(net(), small_task(), hard(), checkpoint=tmp_path, progress=lambda p: messages.append(p.message))
        assert messages[0] == "going on from epoch 2, step 2"
        assert set(messages[1:]) == {""}
        with pytest.raises(Interrupted, match="nothing was saved"):
            train(net(), small_task(), hard(), should_stop=StopAfter(2))

    @pytest.mark.parametrize("change", ["config", "seed", "weights", "data"])
    def test_another_runs_checkpoint_is_not_taken(self, tmp_path: Path, change: str) -> None:
        with pytest.raises(Interrupted):
            train(net(), small_task(), hard(), checkpoint=tmp_path, should_stop=StopAfter(3))
        task = digits(batch_size=20, train_limit=151, validation=0.2) if change == "data" else small_task()
        config = hard(lr=0.04) if change == "config" else hard()
        seed = 1 if change == "seed" else 0

        def run(**given: Any) -> dict[str, Tensor]:
            model = net(3) if change == "weights" else net()
            train(model, task, config, seed=seed, **given)
            return weights(model)

        messages: list[str] = []
        found = run(checkpoint=tmp_path, progress=lambda p: messages.append(p.message))
        assert messages[0] == f"the checkpoint in {tmp_path} is of another run and is replaced"
        assert_same(found, run())


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from small_training import hard, net, small_task
from compress.train import train
print("ready", flush=True)
train(net(), small_task(), hard(epochs=4), seed=4, checkpoint=Path({folder!r}), checkpoint_seconds=0.0,
      progress=lambda p: (print(p.epoch, p.step, flush=True), time.sleep(0.05)))
"""


# In a process of its own, for autograd's threads do not survive a fork. All that a child would load is loaded
# before, so that kills fall among its steps. Prints how many were killed, and how many checkpoints they left.
KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import torch._dynamo
from small_training import hard, net, small_task, uninterrupted
small_task()
torch.optim.SGD(net().parameters())
folder, left = Path({folder!r}), set()
generator, killed = torch.Generator().manual_seed(7), 0
while True:
    child = os.fork()
    if child == 0:
        try:
            slowly = dict(progress=lambda p: time.sleep(0.02))  # so that the first kills cannot miss
            uninterrupted(hard(), checkpoint=folder, checkpoint_seconds=0.0, **slowly)
        finally:
            os._exit(0)
    time.sleep(0.02 + 0.1 * float(torch.rand(1, generator=generator)) * (1 + killed / 5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
    killed += 1
    left.add(tuple(path.read_bytes() for path in sorted(folder.glob("*.json"))))
print(killed, len(left))
"""


class TestKilled:
    @pytest.mark.slow
    def test_by_sigkill_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        """Killed in the middle of epoch 2, then gone on with here."""
        root = Path(__file__).parent
        script = SCRIPT.format(tests=str(root), folder=str(tmp_path))
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root.parent
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "2 3":
                process.kill()
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        expected, _ = uninterrupted(hard(epochs=4))
        messages: list[str] = []
        found, _ = uninterrupted(
            hard(epochs=4), checkpoint=tmp_path, progress=lambda p: messages.append(p.message)
        )
        assert messages[0].startswith("going on from epoch 2, step ")
        assert_same(found, expected)

    @pytest.mark.slow
    def test_at_any_moment(self, tmp_path: Path) -> None:
        """Forked children, saving at every step, are killed after random times until one gets to the end."""
        root = Path(__file__).parent
        script = KILLER.format(tests=str(root), folder=str(tmp_path))
        ended = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root.parent, check=True
        )
        killed, left = map(int, ended.stdout.split()[-2:])
        assert killed >= 3
        assert left >= 3, f"{killed} kills fell on {left} checkpoints"
        expected, expected_facts = uninterrupted(hard())
        found, found_facts = uninterrupted(hard(), checkpoint=tmp_path)
        assert_same(found, expected)
        assert found_facts == expected_facts
        files.clean(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} <= {"a.json", "a.safetensors", "b.json", "b.safetensors"}


class TestCheckpoint:
    def snapshot(self, value: float) -> disk.Snapshot:
        tensors = {
            "x": torch.full((3,), value),
            "n": torch.tensor(3),
            "bytes": torch.zeros(2, dtype=torch.uint8),
        }
        return disk.Snapshot(tensors, {"value": value})

    def test_round_trip_and_two_generations(self, tmp_path: Path) -> None:
        assert disk.load(tmp_path) is None
        for value in (1.0, 2.0, 3.0):
            disk.save(tmp_path, self.snapshot(value))
            found = disk.load(tmp_path)
            assert found is not None
            assert found.state == {"value": value}
            assert torch.equal(found.tensors["x"], torch.full((3,), value))
            assert found.tensors["bytes"].dtype == torch.uint8
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "a.json",
            "a.safetensors",
            "b.json",
            "b.safetensors",
        ]
        values = [json.loads((tmp_path / f"{slot}.json").read_text())["state"]["value"] for slot in "ab"]
        assert sorted(values) == [2.0, 3.0]

    def test_shared_and_strided_tensors(self, tmp_path: Path) -> None:
        x = torch.arange(6.0).view(2, 3)
        disk.save(tmp_path, disk.Snapshot({"x": x, "alias": x, "turned": x.T}, {}))
        found = disk.load(tmp_path)
        assert found is not None
        assert torch.equal(found.tensors["turned"], x.T)
        assert torch.equal(found.tensors["alias"], x)

    def test_every_flipped_byte_goes_back_one_generation(self, tmp_path: Path) -> None:
        for value in (1.0, 2.0):
            disk.save(tmp_path, self.snapshot(value))
        newest = tmp_path / "b.safetensors"
        whole = newest.read_bytes()
        for position in range(0, len(whole), 7):
            data = bytearray(whole)
            data[position] ^= 0x10
            newest.write_bytes(data)
            found = disk.load(tmp_path)
            assert found is not None
            assert found.state == {"value": 1.0}
            assert found.note.startswith("b.safetensors has changed: sha256 ")

    @pytest.mark.parametrize("damage", ["cut", "gone", "record"])
    def test_one_damaged_generation(self, tmp_path: Path, damage: str) -> None:
        for value in (1.0, 2.0):
            disk.save(tmp_path, self.snapshot(value))
        if damage == "record":
            (tmp_path / "b.json").write_text('{"format": 1, "serial"')
        elif damage == "gone":
            (tmp_path / "b.safetensors").unlink()
        else:
            (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-1])
        found = disk.load(tmp_path)
        assert found is not None
        assert found.state == {"value": 1.0}
        disk.save(tmp_path, self.snapshot(5.0))  # the damaged one is the one that is replaced
        found = disk.load(tmp_path)
        assert found is not None
        assert found.state == {"value": 5.0}

    def test_both_damaged(self, tmp_path: Path) -> None:
        for value in (1.0, 2.0):
            disk.save(tmp_path, self.snapshot(value))
        for slot in "ab":
            (tmp_path / f"{slot}.safetensors").write_bytes(b"x")
        refused(
            IntegrityError, 8, lambda: disk.load(tmp_path), "b.safetensors has changed", "remove this folder"
        )

    def test_a_full_disk_leaves_the_last_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        disk.save(tmp_path, self.snapshot(1.0))

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        refused(ResourceError, 7, lambda: disk.save(tmp_path, self.snapshot(2.0)), "no space left")
        found = disk.load(tmp_path)
        assert found is not None
        assert found.state == {"value": 1.0}

    def test_a_damaged_newest_one_is_told_and_the_result_is_the_same(self, tmp_path: Path) -> None:
        config = hard(epochs=2)
        expected, _ = uninterrupted(config)
        with pytest.raises(Interrupted):
            train(
                net(),
                small_task(),
                config,
                seed=4,
                checkpoint=tmp_path,
                checkpoint_seconds=0,
                should_stop=StopAfter(8),
            )
        records = {slot: json.loads((tmp_path / f"{slot}.json").read_text())["serial"] for slot in "ab"}
        newest = tmp_path / f"{max(records, key=lambda slot: records[slot])}.safetensors"
        save_file({"model/x": torch.zeros(1)}, str(newest))
        messages: list[str] = []
        found, _ = uninterrupted(config, checkpoint=tmp_path, progress=lambda p: messages.append(p.message))
        assert f"an earlier checkpoint, because {newest.name} has changed" in messages[0]
        assert_same(found, expected)
