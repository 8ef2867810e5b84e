"""The thread that reads and writes block files while the loop serves."""

import threading
from collections import deque
from collections.abc import Callable

from common.kv_layout import KvLayout
from kvstore.server.block_memory import BlockMemory
from kvstore.server.core.actions import DeleteDisk, DiskJob, ReadDisk, ScanDisk, WriteDisk
from kvstore.server.disk_folder import DiskFolder
from kvstore.server.inbox import DiskDied, DiskRead, DiskScanned, DiskWritten, Event
from kvstore.server.page_checks import PageChecks


class DiskThread:
    """Performs jobs in the order they were posted, but reads first: somebody waits for them, for nothing else.

    A read may overtake because a block is only asked for once its file is complete, and is not deleted meanwhile. Each job
    but DeleteDisk ends with one event. `on_done` runs in this thread and must only pass the event on. The queue is bounded
    by the core, which pins what waits in it. Whoever made folder and memory closes them, after `stop`.
    """

    def __init__(
        self,
        folder: DiskFolder,
        memory: BlockMemory,
        on_done: Callable[[Event], None],
        checks: PageChecks | None = None,
    ) -> None:
        """`checks`: of what goes to disk, and of what comes from there; None: nothing is verified but files as a whole."""
        self._checks = checks
        self._folder, self._memory, self._on_done = folder, memory, on_done
        self._layout: KvLayout | None = None
        self._changed = threading.Condition()  # guards what follows
        self._reads: deque[DiskJob] = deque()
        self._others: deque[DiskJob] = deque()
        self._closing, self._stopping = False, False
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    def post(self, job: DiskJob) -> None:
        """Queue a job. The loop's thread; not after `stop`."""
        with self._changed:
            (self._reads if isinstance(job, ReadDisk) else self._others).append(job)
            self._changed.notify()

    def stop(self, within_s: float = 5.0) -> None:
        """Finish what is queued, or as much of it as `within_s` allows; then end after the job in progress."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(within_s)
        self._stopping = True
        self._thread.join()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._perform(job)
        except BaseException as error:
            self._on_done(DiskDied(error))
            raise

    def _next(self) -> DiskJob | None:
        """The job that is due; None if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._reads or self._others or self._closing)
            if self._stopping or not (self._reads or self._others):
                return None
            return self._reads.popleft() if self._reads else self._others.popleft()

    def _perform(self, job: DiskJob) -> None:
        if isinstance(job, ScanDisk):
            self._layout = job.layout
            self._on_done(DiskScanned(self._folder.scan(job.layout, job.limit_blocks), self._folder.discarded_files))
            return
        layout = self._layout
        assert layout is not None, "the first job is a scan"
        match job:
            case WriteDisk(block, pages):
                wrong = "" if self._checks is None else self._checks.before_disk(pages)
                text = wrong or self._folder.write(block, layout, self._memory.parts(pages))
                self._on_done(DiskWritten(block.name, text, bool(wrong)))
            case ReadDisk(block, pages):
                ok = self._folder.read(block, layout, self._memory.parts(pages))
                if ok and self._checks is not None:
                    self._checks.make(pages)  # the file's own checksum was right a moment ago
                self._on_done(DiskRead(block.name, ok))
            case DeleteDisk(name):
                self._folder.delete(name, layout)
