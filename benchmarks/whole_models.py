"""Result files of `benchmarks.full_size` as lines of a table."""

from __future__ import annotations

import argparse
import shlex

from . import full_size
from .full_size import GB

HEADINGS = {  # of a column, with its rule
    **dict.fromkeys(("machine", "checkpoint", "what is tuned", "a step"), "---"),
    **dict.fromkeys(("tokens/s", "of the ceiling"), "---:"),
    **dict.fromkeys(("peak memory, private + pages of files", "to the first step"), "---:"),
    "date": "---",
}


def table(results: list[dict]) -> list[list[str]]:
    """Headings, rules, and a line for each run."""
    return [list(HEADINGS), list(HEADINGS.values()), *map(_line, results)]


def _line(found: dict) -> list[str]:
    words = shlex.split(found["command"])
    run = full_size.parse(words[words.index("benchmarks.full_size") + 1 :])
    given = _given(run.rest)
    step = [f"{found['tokens_a_step']} tokens"]
    step += ["layers recomputed"] * given.gradient_checkpointing
    step += ["files not in the page cache"] * found["cold_file_cache"]
    step += [f"{run.less:g} GB of memory less"] * bool(run.less)
    rate = max(found[when]["rate"] for when in ("ceilings", "ceilings_at_the_end"))
    private, mapped = (found[f"peak_{which}_bytes"] / GB for which in ("private", "mapped"))
    machine = found["machine"].removesuffix(f", {found['processor']['cores']} cores")
    return [
        f"{machine}, `{found['instruction_set']}`",
        f"{run.model}, {run.format}{' nested' * run.nested}",
        f"rank {given.rank}{', 8-bit Adam' * (given.optimizer == 'adamw_8bit')}",
        ", ".join(step),
        f"{found['tokens_per_second']:.1f}",
        f"{found['share_of_ceiling']:.0%} of {rate / GB:.0f} GF/s".replace("%", " %"),
        f"{private:.1f} + {mapped:.1f} GB",
        f"{found['seconds_to_first_step']:.0f} s",
        found["date"].partition("T")[0],
    ]


def _given(options: list[str]) -> argparse.Namespace:
    """Of the options of `finetune`, those that the table tells."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_known_args(options)[0]
