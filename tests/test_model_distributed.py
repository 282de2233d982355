"""Two processes over gloo against one: DDP, FSDP2, FSDP1, and expert parallelism as transformers does it."""

import subprocess
import sys

import model_distributed
import pytest
import torch
from model_tiny import build, difference


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process found, and what each of the two did."""
    directory = tmp_path_factory.mktemp("distributed")
    build("qwen3_moe_ep").save_pretrained(directory / "base")
    command = [sys.executable, model_distributed.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(directory)], stderr=subprocess.PIPE, text=True)
        for rank in range(model_distributed.WORLD)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = model_distributed.one_process(directory / "base")
    torch.set_num_threads(threads)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return expected, [torch.load(directory / f"found{rank}.pt") for rank in range(len(processes))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "reference"),
    [
        ("ddp", "data"),
        ("fsdp", "data"),
        ("fsdp1", "data"),
        ("all_reduce", "experts"),
        ("all_to_all", "experts"),
    ],
)
def test_two_processes_train_like_one(runs, way, reference):
    expected, found = runs[0][reference], [rank[way] for rank in runs[1]]
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        parameters = {name.removeprefix("module."): p for name, p in rank["parameters"].items()}
        assert parameters.keys() == expected["parameters"].keys() and parameters
        for name, parameter in expected["parameters"].items():
            assert difference(parameters[name], parameter) < 1e-5, name
