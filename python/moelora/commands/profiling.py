"""torch.profiler over some steps of a training."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities
from transformers import TrainerCallback

from moelora.commands import directory

WARMUP = 2  # steps before those that are measured: the first ones also allocate and compile
TRACE, TABLE = "trace.json", "profile.txt"
ROWS = 20


class Profiler(TrainerCallback):
    """Writes a trace of `steps` steps, for Perfetto or chrome://tracing, and a table of the slowest.

    Args:
        out: the directory for both files.
        steps: how many steps to measure, after WARMUP others.
    """

    def __init__(self, out: Path, steps: int):
        self.out, self.steps = out, steps
        self.table: str | None = None
        self._profile: profile | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._profile = profile(
            activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA},
            schedule=schedule(wait=1, warmup=WARMUP - 1, active=self.steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        self._profile.step()

    def on_train_end(self, args, state, control, **kwargs):
        self._profile.stop()

    def _write(self, measured: profile) -> None:
        events = measured.key_averages()
        by = (
            "self_device_time_total"
            if any(e.self_device_time_total for e in events)
            else "self_cpu_time_total"
        )
        self.table = events.table(sort_by=by, row_limit=ROWS, max_name_column_width=40)
        directory.publish(self.out, TRACE, lambda path: measured.export_chrome_trace(str(path)))
        directory.publish(self.out, TABLE, lambda path: path.write_text(self.table, encoding="utf-8"))
