"""Where rows go: the run's own files, the console, TensorBoard and W&B as their own readers see them."""

import json
import math
import os
import struct
import sys

import pytest

from neox.analysis.sample_hook import SampleHook
from neox.config import load_config
from neox.train import Trainer, run_config
from neox.train.metrics import read_rows
from neox.train.sinks import ConsoleSink, JsonlSink, build_sinks, check_trackers, visible
from neox.train.trackers import TensorBoard, grouped
from tests.train.helpers import TINY, cut_back, rows, token_pair

ROW = {
    "step": 7,
    "loss": 3.25,
    "lr": 9.5e-4,
    "grad_norm": 0.456,
    "tokens": 896,
    "tokens_per_second": 12345.6,
    "mfu": 0.41,
    "eta": 61.2,
    "time": 1.7e9,
}


def options(tmp_path, *more: str) -> tuple[str, ...]:
    text = tmp_path / "a.txt"
    if not text.exists():
        text.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(600)))
    vocabulary = ("model.vocab_size=512", "tokenizer.vocab_size=300")
    data = (f"data.train={text}", f"data.valid={text}", "eval.every=2", "eval.batches=1")
    return (*TINY, *vocabulary, *data, "steps=4", "checkpoint.every=2", f"out={tmp_path / 'run'}", *more)


def fit(tmp_path, *more: str):
    config = load_config(overrides=options(tmp_path, *more))
    assert Trainer(config, hooks=(SampleHook(config),), quiet=True).fit().finished
    return tmp_path / "run"


def resume(run):
    config = run_config(run)
    assert Trainer(config, resume=True, hooks=(SampleHook(config),), quiet=True).fit().finished


# --- the run's own files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "kept"), [(0, []), (4, [0, 2, 4])])
def test_a_resumed_run_drops_what_is_beyond_its_checkpoint(tmp_path, first, kept):
    """Also the sample of step 0, where the run begins once more at step 0 and writes it once more."""
    sink = JsonlSink(tmp_path, 0)
    for step in (0, 2, 4, 6):
        sink.write({"step": step, "loss": 1.0})
        sink.sample({"step": step, "prompt": "", "text": "é\u2028"})
    sink.close()
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 3, "te')
    JsonlSink(tmp_path, first).close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [row["step"] for row in read_rows(tmp_path / name)] == kept
    assert all(row["text"] == "é\u2028" for row in read_rows(tmp_path / "samples.jsonl"))


def test_what_is_not_finite_is_null_in_the_file_and_told_on_the_console(tmp_path, capsys):
    for sink in (JsonlSink(tmp_path, 0), ConsoleSink(0, 20)):
        sink.write({**ROW, "loss": math.nan, "grad_norm": math.inf})
        sink.write({"step": 8, "valid_loss": -math.inf})
        sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, valid = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (train["loss"], train["grad_norm"], train["lr"], valid["valid_loss"]) == (None, None, 9.5e-4, None)
    assert "loss nan  norm inf" in capsys.readouterr().err


def test_without_samples_there_is_no_file_of_them(tmp_path):
    JsonlSink(tmp_path, 0).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_disk_full_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    for name, call in (("metrics", JsonlSink.write), ("samples", JsonlSink.sample)):
        sink = JsonlSink(tmp_path, 0)
        sink.sample({"step": 0})
        file = sink.rows if name == "metrics" else sink.samples
        file.file.close()
        file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match="free space, then resume the run") as caught:
            call(sink, {"step": 1})
        assert caught.value.filename == str(tmp_path / f"{name}.jsonl")
        sink.close()


# --- the console -----------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(capsys):
    sink = ConsoleSink(0, 20)
    sink.step(6)
    sink.write(ROW)
    sink.write({"step": 8, "valid_loss": 3.5})
    sink.sample({"step": 8, "prompt": "[b]The", "text": " end\x1b[31m\n"})
    sink.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 7/20  loss 3.2500  norm 0.456  lr 9.50e-04  12,346 tok/s  MFU 0.41  eta 61 s",
        "step 8: held-out loss 3.5000",
        "step 8, a sample: [b]The▸ end␛[31m",
        "",
    ]


@pytest.mark.parametrize(("columns", "there"), [(160, True), (90, False)])
def test_a_terminal_shows_what_it_has_room_for(monkeypatch, capsys, columns, there):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    sink = ConsoleSink(0, 20)
    sink.write(ROW)
    sink.close()
    shown = capsys.readouterr().err
    assert "loss 3.2500" in shown
    assert "MFU" in shown
    assert "7/20" in shown
    assert ("norm 0.456" in shown, "lr 9.50e-04" in shown) == (there, there)


def test_no_control_character_passes():
    every = "".join(map(chr, range(0x100)))
    shown = visible(every)
    assert len(shown) == len(every)
    assert {c for c in shown if not c.isprintable() and c not in " \xa0\xad"} == {"\n", "\t"}


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def events(run):
    """By the accumulator that is documented for programs, and by the one behind TensorBoard's own pages."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    everything = {"scalars": 0, "tensors": 0}
    return (
        event_accumulator.EventAccumulator(str(run / "tensorboard"), everything).Reload(),
        plugin_event_accumulator.EventAccumulator(str(run / "tensorboard"), {"tensors": 0}).Reload(),
    )


def test_tensorboard_reads_every_row_also_of_a_resumed_run(tmp_path):
    run = fit(tmp_path, "log.tensorboard=true", "log.sample_every=2", "log.sample_tokens=5")
    first = events(run)
    cut = cut_back(run, tmp_path / "cut", 2)
    resume(cut)
    for (found, pages), folder in ((first, run), (events(cut), cut)):
        kept = read_rows(folder / "metrics.jsonl")
        train, valid = ([row for row in kept if key in row] for key in ("loss", "valid_loss"))
        assert [row["step"] for row in train] == [1, 2, 3, 4]
        for tag, key, source in (
            ("train/loss", "loss", train),
            ("train/lr", "lr", train),
            ("train/grad_norm", "grad_norm", train),
            ("runtime/tokens_per_second", "tokens_per_second", train),
            ("runtime/mfu", "mfu", train),
            ("validation/loss", "valid_loss", valid),
        ):
            scalars = found.Scalars(tag)
            assert [event.step for event in scalars] == [row["step"] for row in source], tag
            # Events are float32.
            assert [event.value for event in scalars] == pytest.approx([row[key] for row in source], rel=1e-6)
        assert found.Scalars("train/loss")[0].wall_time == pytest.approx(train[0]["time"])
        samples = read_rows(folder / "samples.jsonl")
        texts = pages.Tensors("samples/text_summary")
        assert [event.step for event in texts] == [row["step"] for row in samples] == [0, 2, 4]
        for event, row in zip(texts, samples, strict=True):
            shown = event.tensor_proto.string_val[0].decode()
            assert shown == "\n".join("    " + line for line in (row["prompt"] + row["text"]).splitlines())
        assert b"hidden_size = 32" in pages.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_names_group_as_users_know_them():
    row = {"step": 1, "time": 2.0, "loss": 1.0, "mfu": 0.5, "hfu": 0.6, "samples": 3, "valid_loss": 4.0, "norm/a": 5.0}
    assert grouped({**row, "text": "x"}) == {
        "train/loss": 1.0,
        "runtime/mfu": 0.5,
        "runtime/hfu": 0.6,
        "train/samples": 3,
        "validation/loss": 4.0,
        "norm/a": 5.0,
    }


# --- a tracker that fails --------------------------------------------------------------------------------------------


def pair_options(tmp_path, *more):
    return (*TINY, f"data.train={token_pair(tmp_path / 'train')}", "steps=4", f"out={tmp_path / 'run'}", *more)


def train(tmp_path, *more):
    assert Trainer(load_config(overrides=pair_options(tmp_path, *more)), quiet=True).fit().finished
    return [row["step"] for row in rows(tmp_path / "run")]


def test_a_tracker_that_cannot_begin(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # a run that has begun
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert train(tmp_path, "log.tensorboard=true") == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("warning: TensorBoard is disabled from here on (")
    assert err.endswith("; metrics.jsonl has every row\n")


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_tracker_that_fails_later(tmp_path, capsys, monkeypatch, method):
    def fail(*_):
        raise ConnectionError("the network is gone\nTraceback ..")

    monkeypatch.setattr(TensorBoard, method, fail)
    assert train(tmp_path, "log.tensorboard=true", "checkpoint.every=1") == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "TensorBoard is disabled from here on (the network is gone Traceback )" in err


def test_a_disk_that_fills_under_tensorboard(tmp_path, capsys, monkeypatch):
    """The event file is /dev/full from the second step on."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    plain = TensorBoard.write

    def write(self, row):
        if row["step"] == 2:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self.file.fileno())
            os.close(full)
        plain(self, row)

    monkeypatch.setattr(TensorBoard, "write", write)
    assert train(tmp_path, "log.tensorboard=true", "checkpoint.every=1") == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left on device" in err


@pytest.mark.parametrize(("key", "option"), [("tensorboard", "log.tensorboard=true"), ("wandb", "log.wandb=neox")])
def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch, key, option):
    monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(
        ValueError, match=rf"^log\.{key}: needs the package {key} \(not installed\): pip install 'neox-lm\[log\]'"
    ):
        Trainer(load_config(overrides=pair_options(tmp_path, option)))
    assert not (tmp_path / "run").exists()
    check_trackers(load_config())


def test_no_tracker_unless_asked_for(tmp_path):
    sinks = build_sinks(load_config(), tmp_path, 0, quiet=True)
    assert [type(sink) for sink in sinks] == [JsonlSink]
    sinks[0].close()


# --- Weights & Biases ------------------------------------------------------------------------------------------------


def history(file):
    """{step: {key: value}} of an offline run: records in LevelDB's log format, each a protobuf of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    data, place, record, found = file.read_bytes(), 7, b"", {}
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if not kind:
            break
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if message.WhichOneof("record_type") == "history":
                items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in message.history.item}
                found.setdefault(items["_step"], {}).update(items)
    return found


@pytest.mark.slow
def test_wandb_keeps_one_run_over_a_resume(tmp_path, monkeypatch):
    import wandb

    for key in ("MODE=offline", "SILENT=true", f"CONFIG_DIR={tmp_path / 'c'}", f"CACHE_DIR={tmp_path / 'd'}"):
        name, _, value = key.partition("=")
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        run = fit(tmp_path, "log.wandb=tests", "log.sample_every=4", "log.sample_tokens=5")
        cut = cut_back(run, tmp_path / "cut", 2)
        resume(cut)
    finally:
        wandb.teardown()
    name = json.loads((run / "wandb.json").read_text())
    assert name == json.loads((cut / "wandb.json").read_text())
    assert name["project"] == "tests"
    first, second = (history(next((run / "wandb").glob(f"offline-run-*/run-{name['id']}.wandb"))), {})
    logs = sorted((cut / "wandb").glob(f"offline-run-*-{name['id']}*/*.wandb"))
    assert len(logs) == 2
    for log in logs:
        second |= history(log)
    for found in (first, second):
        kept = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
        for row in kept:
            assert found[row["step"]]["train/loss"] == row["loss"]
            assert found[row["step"]]["train/lr"] == row["lr"]
        valid = [row for row in read_rows(run / "metrics.jsonl") if "valid_loss" in row]
        assert {row["step"]: found[row["step"]]["validation/loss"] for row in valid} == {
            row["step"]: row["valid_loss"] for row in valid
        }
        assert math.isfinite(found[4]["runtime/mfu"])
    page = next((run / "wandb").glob("offline-run-*/files/media/html/samples_4_*.html"))
    assert page.read_text().startswith("<pre><b></b>")
