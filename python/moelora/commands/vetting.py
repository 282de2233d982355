"""What must be read through of a base, beside the run: whether its numbers are finite, and its digests.

Loading maps files. Reading them from end to end takes seconds where they are in the page cache and minutes
where they are not, and the training need not wait for it: the first steps read the same bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import TrainerCallback

from moelora.commands import fingerprints, finite, pages
from moelora.errors import MoeloraError

PATIENCE = 2.0  # seconds for which a run waits: for all of a small base


class Vetting:
    """A thread that reads through a base. As a context it is over at the end, finished or not."""

    def __init__(self) -> None:
        self._over, self._changed = threading.Event(), threading.Condition()
        self._may_read, self._reading = True, False
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._digests: dict[str, str] = {}

    def __enter__(self) -> Vetting:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def start(self, model: nn.Module, source: Path, known: dict[str, str]) -> None:
        """Begins with a model that was loaded from `source`. `known`: files whose digests are no question."""
        names = [name for name in fingerprints.names(source) if name not in known]
        self._digests = dict(known)
        weights = finite.weights(model)
        tables = {table.data_ptr() for table in pages.looked_up(model) if table.device.type == "cpu"}

        def read() -> None:
            try:
                while weights and not self._ended():
                    name, weight = weights.pop(0)
                    finite.check_weight(name, weight, source, self._ended)
                    if weight.data_ptr() in tables and weight.is_contiguous():
                        pages.give_back(weight)
                for name in names:
                    self._digests[name] = fingerprints.file(source / name, self._ended)
            except Exception as problem:  # told where the run asks
                self._problem = problem
            finally:
                weights.clear()
                with self._changed:
                    self._rest()

        self._thread = threading.Thread(target=read, name="vetting", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is read meanwhile: what is measured has all cores, and the file cache, to itself.

        It begins when the piece that is being read is done, or after PATIENCE.
        """
        with self._changed:
            self._may_read = False
            self._changed.wait_for(lambda: not self._reading, PATIENCE)
        try:
            yield
        finally:
            with self._changed:
                self._may_read = True
                self._changed.notify_all()

    def _rest(self) -> None:
        self._reading = False
        self._changed.notify_all()

    def _ended(self) -> bool:
        """Asked by the thread before each piece of what it reads; answered when it may go on."""
        with self._changed:
            if not self._may_read:
                self._rest()
                self._changed.wait_for(lambda: self._may_read)
            self._reading = True
        return self._over.is_set()

    def check(self, patience: float | None = 0.0) -> None:
        """Waits for so many seconds at most; None: to the end.

        Raises: MoeloraError if the base has been found to be bad.
        """
        self._thread.join(patience)
        if self._problem is not None:
            raise self._problem

    def digests(self) -> dict[str, str]:
        """The digest of each file, when all has been read through. Raises: as `check`."""
        self.check(None)
        if self._over.is_set():
            raise MoeloraError("the files of the base have not been read through")
        return self._digests


class Heed(TrainerCallback):
    """Stops a training whose base is found to be bad."""

    def __init__(self, vetting: Vetting):
        self.vetting = vetting

    def on_step_end(self, args, state, control, **kwargs):
        self.vetting.check()

    def on_train_end(self, args, state, control, **kwargs):
        self.vetting.check(None)
