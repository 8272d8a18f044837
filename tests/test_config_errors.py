"""What is wrong with a config is said at its place, in plain words, with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import BASE

from compress.config import MAX_BYTES, load, loads
from compress.errors import ConfigError

ALIAS = "write the value out where it is needed; quote text that starts with & or *"
EXAMPLE = "make an example with: compress init"
SECTIONS = "bench, budget, data, device, export, finetune, gates, model, out, prune, recipe, seed, ..."


def lines(text: str, *overrides: str) -> list[str]:
    """The messages for a faulty config."""
    with pytest.raises(ConfigError) as caught:
        loads(text, "compress.yaml", overrides)
    assert caught.value.exit_code == 3
    return str(caught.value).splitlines()


def faults(extra: str, *overrides: str) -> list[str]:
    return lines(BASE + extra, *overrides)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "prune:\n  mac_ratio: 0.5\n",
            "compress.yaml:5:3 prune.mac_ratio: unknown key; did you mean macs_ratio?",
        ),
        ("Seed: 1", "compress.yaml:4:1 Seed: unknown key; did you mean seed?"),
        (
            "macs_ratio: 0.3",
            "compress.yaml:4:1 macs_ratio: unknown key; did you mean prune.macs_ratio or budget.macs_ratio?",
        ),
        ("epochs: 1", "compress.yaml:4:1 epochs: unknown key; did you mean train.epochs or finetune.epochs?"),
        (
            "export: {zzz: 1}",
            "compress.yaml:4:10 export.zzz: unknown key; "
            "known: batches, calibration_images, keep_fp32, opset, precisions, tolerance",
        ),
        (
            "finetune: {distill: {temp: 1}}",
            "compress.yaml:4:22 finetune.distill.temp: unknown key; did you mean temperature?",
        ),
        ("prune: {lr: fast}", 'compress.yaml:4:13 prune.lr: expected a number, found "fast"'),
        (
            "prune: {lr: '0.1'}",
            'compress.yaml:4:13 prune.lr: expected a number, found "0.1"; remove the quotes',
        ),
        (
            "prune: {macs_ratio: 50%}",
            'compress.yaml:4:21 prune.macs_ratio: expected a number, found "50%"; write 0.5',
        ),
        ("prune: {lr: true}", "compress.yaml:4:13 prune.lr: expected a number, found true"),
        ("prune: {lr: }", "compress.yaml:4:12 prune.lr: expected a number, found nothing (null)"),
        ("prune: {lr: 0}", "compress.yaml:4:13 prune.lr: must be more than 0, found 0"),
        ("prune: {macs_ratio: 1}", "compress.yaml:4:21 prune.macs_ratio: must be less than 1, found 1"),
        ("data2: 1", "compress.yaml:4:1 data2: unknown key; did you mean data?"),
        ("seed: 1.0", "compress.yaml:4:7 seed: expected a whole number, found 1.0; write 1"),
        ("seed: true", "compress.yaml:4:7 seed: expected a whole number, found true"),
        ("seed: -1", "compress.yaml:4:7 seed: must be at least 0, found -1"),
        (
            "bench: {threads: 99999999999}",
            "compress.yaml:4:18 bench.threads: must be at most 2147483647, found 99999999999",
        ),
        ("bench: {batches: 1}", "compress.yaml:4:18 bench.batches: expected a list, found 1; write [1]"),
        ("bench: {batches: []}", "compress.yaml:4:18 bench.batches: must not be empty, found an empty list"),
        ("bench: {batches: [1, 0]}", "compress.yaml:4:22 bench.batches[1]: must be at least 1, found 0"),
        (
            "bench: {batches: [1, x]}",
            'compress.yaml:4:22 bench.batches[1]: expected a whole number, found "x"',
        ),
        ("out: 5", 'compress.yaml:4:6 out: expected text, found 5; put it in quotes: "5"'),
        ("out: ''", 'compress.yaml:4:6 out: must not be empty, found ""'),
        ('out: "a\\nb"', "compress.yaml:4:6 out: holds a character that cannot be printed; remove it"),
        (
            "gates: {parity: yes}",
            'compress.yaml:4:17 gates.parity: expected true or false, found "yes"; write true',
        ),
        ("gates: {parity: 1}", "compress.yaml:4:17 gates.parity: expected true or false, found 1"),
        (
            "prune: {criterion: tailor}",
            'compress.yaml:4:20 prune.criterion: expected "taylor", "logits", "magnitude" or "random", '
            'found "tailor"; did you mean taylor?',
        ),
        ("prune: {align: x}", 'compress.yaml:4:16 prune.align: expected a whole number or "auto", found "x"'),
        ("prune: {align: 0}", "compress.yaml:4:16 prune.align: must be at least 1, found 0"),
        ("prune: 3", 'compress.yaml:4:8 prune: expected a mapping ("key: value" lines), found 3'),
        ("train: [1]", 'compress.yaml:4:8 train: expected a mapping ("key: value" lines), found a list'),
        (
            "prune: {macs_ratio: 0.5, units_ratio: 0.4}",
            "compress.yaml:4:39 prune.units_ratio: give only one of macs_ratio, params_ratio, units_ratio; "
            "found macs_ratio and units_ratio; set the others to null",
        ),
        (
            "prune: {keep: [fc, 're:(']}",
            "compress.yaml:4:20 prune.keep[1]: not a valid regular expression (missing ), unterminated "
            "subpattern at position 0); check what follows re:",
        ),
        (
            "device: gpu",
            'compress.yaml:4:9 device: expected "auto", "cpu" or "cuda", found "gpu"; '
            "for one GPU of many: cuda:1",
        ),
        (
            "train: {epochs: 2, warmup_epochs: 3}",
            "compress.yaml:4:35 train.warmup_epochs: must be at most epochs (2), found 3",
        ),
        (
            "gates: {speedup: 1.5, runner: tensorrt}\nbench: {runners: [torch]}",
            'compress.yaml:4:31 gates.runner: no runner of this name is measured, found "tensorrt"; '
            "add it to bench.runners",
        ),
        (
            "gates: {latency_ms: 1.5, batch: 3}\nbench: {batches: [1, 32]}",
            "compress.yaml:4:33 gates.batch: this batch size is not measured, found 3; "
            "add it to bench.batches",
        ),
        (
            "seed: 1\nseed: 2",
            "compress.yaml:5:1 seed: duplicate key; it is already given on line 4; keep one of the two",
        ),
        ("bench:\n\tthreads: 1", "compress.yaml:5:1: a tab is not allowed here; use spaces"),
        ("out: [a", "compress.yaml:4:6: this list is never closed, or lacks a comma; write it as [1, 2, 3]"),
        (
            "data: &a 1",
            "compress.yaml:4:1 data: duplicate key; it is already given on line 3; keep one of the two",
        ),
        ("bench: {seconds: .inf}", "compress.yaml:4:18 bench.seconds: expected a finite number, found .inf"),
        ("? [a]\n: 1", "compress.yaml:4:3 ?: a key must be text, found a list; put it in quotes"),
        ("model.name: x", "compress.yaml:4:1 model.name: unknown key; did you mean model?"),
        (
            "budget: {latency_ms: 2}\nprune:\n  params_ratio: 0.3",
            "compress.yaml:6:17 prune.params_ratio: there is a budget too, which takes the place of "
            "params_ratio; remove one of the two",
        ),
        (
            "budget: {latency_ms: 2, latency_ratio: 0.5}",
            "compress.yaml:4:40 budget.latency_ratio: give only one of latency_ms, latency_ratio and "
            "energy_ratio; found latency_ms and latency_ratio",
        ),
        (
            "budget: {batch: 1}",
            "compress.yaml:4:9 budget: must name a limit; give latency_ms, latency_ratio, energy_ratio, "
            "macs_ratio, params_ratio or memory_ratio",
        ),
        (
            "budget: {memory_ratio: 1}",
            "compress.yaml:4:24 budget.memory_ratio: must be less than 1, found 1",
        ),
        ("budget: {latency_ms: 0}", "compress.yaml:4:22 budget.latency_ms: must be more than 0, found 0"),
        (
            "budget: {latncy_ms: 1}",
            "compress.yaml:4:10 budget.latncy_ms: unknown key; did you mean latency_ms?",
        ),
    ],
)
def test_messages(extra: str, expected: str) -> None:
    found = faults(extra)
    assert expected in found


def test_the_mean_has_a_number_for_each_channel() -> None:
    text = BASE.replace("{name: mnist5k}", "{name: mnist5k, mean: [0.5, 0.5], std: [0.5, 0.5, 0.5]}")
    assert lines(text) == [
        "compress.yaml:3:29 data.mean: expected 3 numbers, one per channel of model.input_shape, found 2"
    ]


def test_missing_keys_say_what_to_add() -> None:
    assert lines("model: {}\nversion: 1") == [
        "compress.yaml:1:1 model.name: this key must be given; "
        "add name: torchvision:NAME, timm:NAME, package.module:function, or a .pt2 file",
        "compress.yaml:1:1 model.input_shape: this key must be given; "
        "add input_shape: one input without the batch, e.g. [3, 224, 224]",
        "compress.yaml:1:1 data: this key must be given; add data: the data it is pruned and judged on",
    ]


@pytest.mark.parametrize("value", ["2", "'1'", "true", "1.0", "null"])
def test_only_version_1(value: str) -> None:
    found = lines(BASE.replace("version: 1", f"version: {value}"))
    assert found[0].startswith("compress.yaml:1:10 version: expected 1, found ")


def test_all_faults_at_once_in_the_order_of_the_file() -> None:
    text = BASE + "seed: x\nprune: {lr: -1, zz: 1}\nout: &a 5\nbench: {batches: [0, 1, 0]}\nseed: 2\n"
    places = [line.split(": ")[0] for line in lines(text, "device=gpu", "nonsense")]
    assert places == [
        "compress.yaml:4:7 seed",
        "compress.yaml:5:13 prune.lr",
        "compress.yaml:5:17 prune.zz",
        "compress.yaml:6:6 out",
        "compress.yaml:7:19 bench.batches[0]",
        "compress.yaml:7:25 bench.batches[2]",
        "compress.yaml:8:1 seed",
        "--set nonsense",
        "--set device",
    ]


def test_a_flood_of_faults_is_cut_short() -> None:
    found = faults("".join(f"x{n}: 1\n" for n in range(500)))
    assert len(found) == 21
    assert found[-1] == "and 480 more faults"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.mac_ratio=0.5", "--set prune.mac_ratio: unknown key; did you mean macs_ratio?"),
        ("prun.lr=0.5", "--set prun.lr: unknown key prun; did you mean prune?"),
        ("train.lrr=1", "--set train.lrr: unknown key; did you mean lr?"),
        ("train={lrr: 1}", "--set train: unknown key train.lrr; did you mean lr?"),
        ("seed", '--set seed: there is no "=" in it; for example: --set prune.macs_ratio=0.5'),
        ("", '--set: there is no "=" in it; for example: --set prune.macs_ratio=0.5'),
        ("=3", "--set: expected SECTION.KEY=VALUE; for example: --set prune.macs_ratio=0.5"),
        (
            "prune..lr=3",
            "--set prune..lr: expected SECTION.KEY=VALUE; for example: --set prune.macs_ratio=0.5",
        ),
        ("seed=", "--set seed: there is no value after the =; write null for none"),
        ("seed.x=3", "--set seed.x: seed holds no keys, it is a value"),
        ("bench.batches=[1, x]", '--set bench.batches: expected a whole number, found "x"'),
        ("bench.threads=1.5", "--set bench.threads: expected a whole number, found 1.5"),
        (
            "data.root=@x",
            "--set data.root: unquoted text cannot start with @; quote it twice: --set 'KEY=\"VALUE\"'",
        ),
        (
            "data.root=*x",
            "--set data.root: aliases (*x) are not allowed; " + ALIAS,
        ),
        (
            "prune.params_ratio=0.3",
            "--set prune.params_ratio: give only one of macs_ratio, params_ratio, units_ratio; "
            "found macs_ratio and params_ratio; set the others to null",
        ),
        ("prune={lr: -1}", "--set prune: must be more than 0, found -1"),
        (
            "a\x1b[31m\n=1",
            "--set a\\x1b[31m: unknown key; known: " + SECTIONS,
        ),
    ],
)
def test_override_messages(override: str, expected: str) -> None:
    assert faults("seed: 1\nprune: {macs_ratio: 0.5}\n", override) == [expected]


def test_a_conflict_with_an_override_can_be_mended_by_another() -> None:
    config = loads(
        BASE + "prune: {macs_ratio: 0.5}\n", overrides=["prune.units_ratio=0.3", "prune.macs_ratio=null"]
    )
    assert (config.prune.macs_ratio, config.prune.units_ratio) == (None, 0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "compress.yaml: the file is empty; make one with: compress init"),
        ("# nothing\n---\n", "compress.yaml: the file is empty; make one with: compress init"),
        (
            "- a",
            'compress.yaml:1:1: expected a mapping ("key: value" lines), found a list; ' + EXAMPLE,
        ),
        (
            "\nabc",
            'compress.yaml:2:1: expected a mapping ("key: value" lines), found a single value; ' + EXAMPLE,
        ),
        (
            "*a",
            "compress.yaml:1:1: aliases (*a) are not allowed; " + ALIAS,
        ),
        ("[" * 50, "compress.yaml:1:33: nested more than 32 levels deep"),
        ("#" * (MAX_BYTES + 1), "compress.yaml: is larger than 1048576 characters, the most that is read"),
    ],
)
def test_texts_that_are_no_config(text: str, expected: str) -> None:
    assert lines(text) == [expected]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\nout: gr\xf6\xdfe\n")
    (tmp_path / "folder.yaml").mkdir()
    cases = {
        "none.yaml": "there is no such file; make one with: compress init",
        "big.yaml": "is larger than 1048576 bytes, the most that is read; is it a config file?",
        "latin.yaml:2": "byte 18 is not UTF-8 text; save the file as UTF-8",
        "folder.yaml": "cannot be read: not a regular file; give the path of a .yaml file",
        "big.yaml/x": "cannot be read: Not a directory; give the path of a .yaml file",
        "a\0b": "cannot be read: embedded null byte; give the path of a .yaml file",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name.split(":")[0])
        assert str(caught.value) == f"{tmp_path}/{name}: {words}".replace("\0", "\\x00")
