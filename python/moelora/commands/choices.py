"""What the commands that write checkpoints share: their choice of formats, refusals, the line at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelora.checkpoint_writer import Written, cores
from moelora.commands import threads
from moelora.errors import MoeloraError
from moelora.packed_layout import Choice, Layout

DENSE = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
DENSE |= {"fp32": "float32", "float32": "float32"}


def layout(explicit: dict[str, Any]) -> Layout | None:
    """What --format, --nested, --group-size and --linears say; None for a dense format.

    Raises: MoeloraError if they contradict each other or name what does not exist.
    """
    name, linears = explicit["format"], explicit.get("linears")
    group, nested = explicit.get("group_size"), explicit.get("nested", False)
    if name in DENSE:
        for flag, value in (("--nested", nested), ("--group-size", group), ("--linears", linears)):
            if value not in (None, False):
                raise MoeloraError(f"{flag} is for packed weights, and --format {name} has none")
        return None
    try:
        experts = Choice.of(name, group, nested)
    except MoeloraError as error:
        raise MoeloraError(f"--format {name}: {error}") from None
    try:
        return Layout(experts, None if linears is None else Choice.of(linears))
    except MoeloraError as error:
        raise MoeloraError(f"--linears {linears}: {error}") from None


def check_shapes(choices: Mapping[str, tuple[Choice, int, int]]) -> None:
    """Raises: MoeloraError for the first weight, given as (choice, N, K), that cannot be packed as chosen."""
    for name, (choice, n, k) in choices.items():
        if why := choice.misfit(n, k):
            raise MoeloraError(f"{name} cannot be packed: {why}")


def workers(explicit: dict[str, Any]) -> int:
    """How many threads to use. Raises: MoeloraError for more than any machine like this one can."""
    if (count := explicit.get("threads")) is not None:
        threads.check(count)
    return count or cores()


def finished(out: Any, written: Written, seconds: float) -> str:
    """What was written, in a line."""
    resumed = f", {written.resumed} of them from before" if written.resumed else ""
    return (
        f"wrote {out}: {written.nbytes / 1e9:.2f} GB in {written.files} files{resumed}, in {seconds:.0f} s "
        f"({written.nbytes / 1e6 / max(seconds, 1e-3):.0f} MB/s)"
    )
