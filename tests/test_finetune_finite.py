"""Numbers that are not finite, told apart; what is compared at a run's end; threads; options out of range."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from finetune_tiny import (
    TEXT,
    WEIGHTS,
    arguments,  # noqa: F401  (a fixture)
    changed,
    copy,
    fails,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import adapt, build, one_thread, tokens  # noqa: F401  (one_thread is autouse)
from moelora import MoeloraError, checkpoints, standin
from moelora.__main__ import main
from moelora.commands import finite, head, reloading, threads, training
from safetensors.torch import load_file, save_file

from torch_moelora import formats

NAN, INF = float("nan"), float("inf")
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


# ---- the base


def test_command_names_the_tensor(arguments, model_dir, tmp_path, capsys):  # noqa: F811
    weight = load_file(model_dir / WEIGHTS)[DOWN]
    weight[3, 5] = NAN
    directory = copy(model_dir, tmp_path / "m", **{DOWN: weight})
    told = fails(changed(arguments, model=directory), capsys)
    assert "are not finite: model.layers.1.mlp.experts.down_proj has 1 NaN among 2,400 elements" in told
    assert "learning-rate" not in told and not (tmp_path / "out").exists()


def _check(model):
    for name, tensor in finite.weights(model):
        finite.check_weight(name, tensor, "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights(dtype):
    model = build("qwen3_moe", dtype)
    _check(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.finfo(dtype).max)  # its sum overflows
    _check(model)
    with torch.no_grad():
        model.lm_head.weight[0, :3] = torch.tensor([INF, -INF, NAN])
    with pytest.raises(MoeloraError, match=r"in here are not finite: lm_head.weight has 1 NaN and 2 Inf"):
        _check(model)


@pytest.mark.parametrize(
    ("form", "part", "nan"), [("fp8", "codes", 0xFF), ("fp8", "scale", NAN), ("nvfp4", "scale", 0x7F),
    ("mxfp4", "scale", 0xFF), ("int8", "scale", INF)],
)  # fmt: skip
def test_packed_weights(form, part, nan):
    model = torch.nn.Module()
    packed = formats.quantize(torch.randn(2, 64, 128), form)
    standin.install(model, "experts", packed, torch.bfloat16, "here")
    _check(model)
    tensor = getattr(packed, part)
    flat = (tensor if tensor.element_size() > 1 else tensor.view(torch.uint8)).view(-1)
    flat[-1] = nan
    what = "1 Inf" if nan == INF else "1 NaN"
    with pytest.raises(MoeloraError, match=f"not finite: experts_packed.{part} has {what} among"):
        _check(model)


@pytest.mark.parametrize("wide_loss", [False, True])
def test_data_on_which_the_base_overflows(
    arguments,  # noqa: F811
    model_dir,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
    wide_loss,
):
    """Whether the loss tells it or, with logits in float32 as on CPUs with slow 16-bit products, does not."""
    for module in (training, head):
        monkeypatch.setattr(module, "slow_in_torch", lambda weight: wide_loss)
    weight = load_file(model_dir / WEIGHTS)["lm_head.weight"] * 3e4
    directory = copy(model_dir, tmp_path / "m", **{"lm_head.weight": weight})
    told = fails(changed(arguments, model=directory, dtype="float16"), capsys)
    assert "before anything was trained, from finite weights: float16 ends at 65504" in told
    assert "learning-rate" not in told


# ---- the loss and the gradients


def _told(call, *args) -> str:
    with pytest.raises(MoeloraError) as caught:
        call(*args)
    return str(caught.value)


def test_losses_are_told_apart():
    model = adapt(build("qwen3_moe"))
    inputs = {"labels": tokens()}
    finite.check_loss(torch.tensor(1.0), model, inputs, 1)
    nan = torch.tensor(NAN)
    nothing = {"labels": torch.full((1, 4), -100)}
    assert "at step 3: its data have no token to learn" in _told(finite.check_loss, nan, model, nothing, 3)
    first = _told(finite.check_loss, nan, model, inputs, 1)
    assert "at step 1, before anything was trained" in first and "learning-rate" not in first
    later = _told(finite.check_loss, nan, model, inputs, 7)
    assert "at step 7, with a finite adapter" in later and "lower --learning-rate" in later
    assert "nan after step 7" in _told(finite.check_held_out, NAN, 7, model)
    assert "inf before anything was trained" in _told(finite.check_held_out, INF, 0, model)
    finite.check_held_out(1.0, 7, model)
    finite.check_logits(tokens().double(), model, "with the adapter")
    logits = torch.tensor([[1.0, INF, NAN]])
    assert "logits have 1 NaN and 1 Inf among 3 elements with the adapter" in _told(
        finite.check_logits, logits, model, "with the adapter"
    )
    name, parameter = finite.trainable(model)[1]
    with torch.no_grad():
        parameter.view(-1)[0] = INF
    told = _told(finite.check_loss, nan, model, inputs, 7)
    assert told.startswith(f"{name} has 1 Inf") and told.endswith("after step 6: lower --learning-rate")
    assert "at a rate of 0.5" in _told(finite.check_adapter, model, 6, 0.5)


def test_gradients():
    model = adapt(build("qwen3_moe"))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    finite.check_gradients(model, 2)
    name, parameter = finite.trainable(model)[2]
    parameter.grad.view(-1)[1] = NAN
    assert f"the gradient of {name} has 1 NaN" in _told(finite.check_gradients, model, 2)


def test_run_that_diverges_says_where(arguments, tmp_path, capsys):  # noqa: F811
    told = fails(changed(arguments, learning_rate=1e38, warmup=0, steps=8), capsys)
    assert "step" in told and "lower --learning-rate" in told


# ---- the reload check


def test_relative_compares_what_can_be_compared():
    expected = torch.randn(5, 7, dtype=torch.float64)
    found = expected * (1 + 1e-3)
    assert reloading.relative(found, expected) == pytest.approx(1e-3)
    expected[1], found[1] = 0, 0
    assert reloading.relative(found, expected) == pytest.approx(1e-3)
    assert reloading.relative(torch.zeros(2, 3), torch.zeros(2, 3)) is None
    found[1, 0] = 1
    assert reloading.relative(found, expected) == INF


def test_empty_texts_on_a_base_whose_end_of_text_is_zero(arguments, model_dir, tmp_path):  # noqa: F811
    embeddings = load_file(model_dir / WEIGHTS)["model.embed_tokens.weight"]
    embeddings[256] = 0
    directory = copy(model_dir, tmp_path / "m", **{"model.embed_tokens.weight": embeddings})
    lines = [*TEXT.splitlines()[:40], *[""] * 5]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert main(changed(arguments, model=directory, data=path, steps=1)) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["reload_difference"] < 1e-4


def test_reload_takes_the_base_from_disk(arguments, model_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Not from memory: a base that is another there is found."""
    directory = copy(model_dir, tmp_path / "m")
    real = reloading.reload

    def reload(model, adapter, base, rows):
        head = load_file(directory / WEIGHTS)["lm_head.weight"]
        copy(directory, tmp_path / "n", **{"lm_head.weight": head * 1.5})
        (tmp_path / "n" / WEIGHTS).replace(directory / WEIGHTS)
        return real(model, adapter, base, rows)

    monkeypatch.setattr(reloading, "reload", reload)
    told = fails(changed(arguments, model=directory, steps=1), capsys)
    assert "reloaded with plain PEFT gives other logits: relative difference 3" in told


def test_reload_compares_the_adapter_to_the_bit(arguments, tmp_path, capsys, monkeypatch):  # noqa: F811
    real, changed_one = reloading.reload, []

    def reload(model, adapter, base, rows):
        file = shutil.copytree(adapter, tmp_path / "other") / "adapter_model.safetensors"
        tensors = load_file(file)
        changed_one.append(name := max(tensors))
        tensors[name].view(-1)[0] += 1e-6
        save_file(tensors, file, {"format": "pt"})
        return real(model, file.parent, base, rows)

    monkeypatch.setattr(reloading, "reload", reload)
    told = fails(changed(arguments, steps=1), capsys)
    assert f"reloaded with plain PEFT has another {changed_one[0]} than the one trained" in told


# ---- threads and options


def test_threads_are_measured_for_every_model(arguments, capsys, monkeypatch):  # noqa: F811
    def choose(step):
        step()
        raise MoeloraError("they were measured")

    monkeypatch.setattr(threads, "choose", choose)
    assert "they were measured" in fails(changed(arguments, threads=None), capsys)


def test_slow_numbers_of_threads_are_given_up(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: calls[-1] if calls else 8)
    costs = {8: 30, 4: 1, 1: 2}
    now = [0]

    def step():
        now[0] += costs[torch.get_num_threads()]

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(threads, "SECONDS", 10**6)
    assert threads.choose(step) == 4
    assert calls.count(8) == 1 and calls.count(4) == threads.ROUNDS + 1


def test_a_disturbance_does_not_decide_the_number_of_threads(monkeypatch):
    """Two of the three rounds are disturbed, as by files that are written back."""
    calls, now = [], [0.0]
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: calls[-1] if calls else 2)

    def step():
        disturbed = calls.count(2) != threads.ROUNDS
        now[0] += (2.2 if disturbed else 1.0) if torch.get_num_threads() == 2 else 1.05

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    assert threads.choose(step) == calls[-1] == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 2**32}, "--seed: expected a whole number of at least 0 and at most 4294967295, got"),
        ({"seed": -1}, "--seed: expected a whole number of at least 0, got '-1'"),
        ({"steps": 10**12}, "--steps: expected a whole number of at least 1 and at most 2147483647"),
        ({"batch_size": 10**30}, "--batch-size: expected a whole number of at least 1 and at most"),
        ({"threads": 10**6}, "--threads is 1000000, expected at most "),
    ],
)
def test_numbers_out_of_range(arguments, capsys, changes, told):  # noqa: F811
    assert told in fails(changed(arguments, **changes), capsys)


def test_text_that_is_none(arguments, tmp_path, capsys):  # noqa: F811
    assert "--prompt is no UTF-8 text" in fails(changed(arguments, prompt="a\udcffb"), capsys)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    assert "rows.jsonl line 2: half of a surrogate pair" in fails(changed(arguments, data=rows), capsys)


def test_too_little_memory_is_told(arguments, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoints, "load", lambda *args: torch.empty(2**58, dtype=torch.uint8))
    told = fails(arguments, capsys)
    assert told.startswith("moelora: error: not enough memory: ") and "smaller --batch-size" in told
