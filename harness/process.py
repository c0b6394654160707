"""What a run needs from the operating system: stop signals, and a lock on its output directory."""

import fcntl
import os
import signal
from pathlib import Path

from harness.console import log


class Interrupted(BaseException):
    """A signal asks the run to stop. Raised only where no work is half done."""


class Signals:
    """Remembers the first SIGINT, SIGTERM or SIGHUP until check() is called.

    A second SIGINT or SIGTERM ends the process at once. A second SIGHUP is ignored, because a
    closing terminal sends several. A signal that was ignored at the start (nohup) stays ignored.
    """

    def __init__(self):
        self.received = None
        possible = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handled = [s for s in possible if signal.getsignal(s) is not signal.SIG_IGN]
        for signum in self._handled:
            signal.signal(signum, self._receive)

    def _receive(self, signum, frame) -> None:
        self.received = signum
        for s in self._handled:
            signal.signal(s, signal.SIG_IGN if s == signal.SIGHUP else signal.SIG_DFL)

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted


class OutputLock:
    """A lock on the output directory, which the kernel releases if the process dies.

    The directory itself is locked, because a lock file in it could be removed.
    """

    def __init__(self, path: Path):
        """Create the directory if needed. Raises ValueError if another process has locked it."""
        self.path, self._is_new = path, not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(
                f"output_dir={path} cannot be made or opened ({error.strerror}); choose another"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(
                f"{path} is in use by another run; wait for it to end, or choose another output_dir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log(f"warning: {path} cannot be locked ({error.strerror}); let no other run use it")

    def is_replaced(self) -> bool:
        """True if the path now leads to another directory, which another run may use."""
        return self.path.exists() and not os.path.samestat(
            os.stat(self.path), os.fstat(self._descriptor)
        )

    def is_lost(self) -> bool:
        return not self.path.exists() or self.is_replaced()

    def release(self) -> None:
        """Unlock the directory, and remove it if it was created here and is still empty."""
        if self._is_new and not self.is_lost() and not any(self.path.iterdir()):
            self.path.rmdir()
        os.close(self._descriptor)
