"""Experts over two ranks, each beside an accelerator of its own: against one process that has all on the CPU.

python test_beside_ranks.py DIRECTORY     what the test runs: two processes over gloo
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

WAYS = [(way, owners) for way in ("compute", "bring") for owners in ("spread", "rank0")]


def test_over_ranks_and_beside(tmp_path):
    """Losses, gradients and the saved adapter. Rows of a device that gloo does not know go by the host."""
    from late_device import build

    build.library()
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "done").exists(), done.stderr[-5000:]


def check(rank: int, directory: Path) -> None:
    """What one of the processes does."""
    import model_tiny
    import moelora
    import torch
    import torch.distributed as dist
    from beside_layers import LATE
    from test_beside_models import put

    def adapted(late: bool) -> torch.nn.Module:
        torch.manual_seed(4)
        model = model_tiny.adapt(model_tiny.build("qwen3_moe", torch.float32))
        moelora.enable(put(model) if late else model)
        return model

    start = {"init_method": f"file://{directory}/store", "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **start)
    rows = model_tiny.tokens(4)
    single = adapted(late=False)
    expected = single(input_ids=rows, labels=rows).loss
    expected.backward()
    wanted = dict(single.named_parameters())
    if rank == 0:
        single.save_pretrained(directory / "one")
    for way, owners in WAYS:
        model = adapted(late=True)
        ranks, beside = moelora.place(model, owners, way=way).layers[0].places
        assert ranks.endswith(f"rank {rank} of 2") and beside.startswith("on cpu beside late:0")
        here = rows.chunk(2)[rank].to(LATE)
        loss = model(input_ids=here, labels=here).loss
        loss.backward()
        mean = loss.detach().cpu()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.detach())
        for name, factor in model.named_parameters():
            if ".lora_" in name:
                part = model.get_submodule(name.rpartition(".")[0])._moelora_part
                own = part.own(wanted[name].grad)
                assert factor.grad.shape == own.shape and factor.grad.device.type == "cpu", name
                assert not own.numel() or model_tiny.difference(factor.grad, own) < 4e-6, (way, owners, name)
        saved = directory / f"{way}-{owners}"
        model.save_pretrained(saved)
        if rank == 0:
            files = [(path / "adapter_model.safetensors").read_bytes() for path in (saved, directory / "one")]
            assert files[0] == files[1]
    if rank == 0:
        (directory / "done").touch()
    dist.barrier()


def main(directory: Path) -> int:
    import torch

    torch.set_num_threads(1)
    pids = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                check(rank, directory)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
