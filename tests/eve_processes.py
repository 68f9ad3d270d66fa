"""Real `eve` processes for tests, forked from one that has imported everything already.

Importing torch and transformers takes seconds, and a test that kills a run 25 times would spend
them 26 times.  What is forked is the command itself, in a process of its own with its own id, which
can be sent signals and killed.  Easy to get wrong: the process that forks must not have started a
thread or touched a random generator, so it imports and waits, nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FORKING = """
import json, os, signal, sys
first = json.loads(sys.stdin.readline())
sys.modules |= dict.fromkeys(first["without"])
import torch, transformers.trainer, eve_vlm.cli, eve_vlm.train.run, tokenizers, yaml, PIL.PngImagePlugin
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "end of" in order:
        print(os.waitpid(order["end of"], 0)[1], flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.environ.update(order["env"])
        os.chdir(order["folder"])
        signal.alarm(order["seconds"])  # 0 sets none
        os.setpgid(0, 0)
        files = os.open(os.devnull, os.O_RDONLY), *(
            os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")
        )
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.argv = ["eve", *order["arguments"]]
        for code in order["before"]:
            exec(code, {})
        try:
            eve_vlm.cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else end.code is not None
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        else:
            code = 0
        raise SystemExit(code)  # and all that the interpreter does at its end, as in any command
    print(pid, flush=True)
"""


class Process:
    """One `eve` command that runs."""

    def __init__(self, pid: int, err: Path):
        self.pid, self.file = pid, err

    @property
    def err(self) -> str:
        """What it has written to stderr."""
        return self.file.read_text(encoding="utf-8", errors="replace")

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return self.file.with_suffix(".out").read_text(encoding="utf-8", errors="replace")

    def send(self, number: int) -> None:
        """Sends a signal; none if it has ended."""
        if self.alive:
            os.kill(self.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it runs; what ended stands as a zombie of the forking process."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state not in "ZX"


class Processes:
    """Starts `eve` commands; a context, which ends all of them.

    Drawing a report at each checkpoint takes longer than a test's run, so matplotlib is not there
    unless `without` says otherwise.
    """

    def __init__(
        self, folder: Path, *, without: tuple[str, ...] = ("matplotlib",), env: dict | None = None
    ):
        self.folder, self.started = folder, []
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "forking.log").open("w")
        self.forking = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {}),
        )
        self._write({"without": without})
        ready = "ready\n" in self.forking.stdout  # libraries may print before
        assert ready, (folder / "forking.log").read_text()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.send(signal.SIGKILL)
        self.forking.stdin.close()
        self.forking.wait(10)
        self.forking.stdout.close()
        self.log.close()

    def start(
        self,
        *arguments: object,
        env: dict | None = None,
        before: tuple = (),
        folder: Path | None = None,
        seconds: int = 0,
    ) -> Process:
        """Starts a command and returns at once.

        Args:
            before: Python that runs in it first.
            folder: where it runs.
            seconds: after which it is ended.
        """
        number = len(self.started)
        err = self.folder / f"{number}.err"
        err.touch()
        order = {
            "arguments": [str(argument) for argument in arguments],
            "env": env or {},
            "before": list(before),
            "folder": str(folder or Path.cwd()),
            "seconds": seconds,
            "out": str(self.folder / f"{number}.out"),
            "err": str(err),
        }
        process = Process(self._ask(order), err)
        self.started.append(process)
        return process

    def exit_code(self, process: Process) -> int:
        """Waits for a command; negative where a signal ended it."""
        return os.waitstatus_to_exitcode(self._ask({"end of": process.pid}))

    def finish(self, *arguments: object, **settings) -> tuple[int, Process]:
        """Runs a command to its end; its exit code and the process."""
        process = self.start(*arguments, **settings)
        return self.exit_code(process), process

    def _write(self, order: dict) -> None:
        self.forking.stdin.write(json.dumps(order) + "\n")
        self.forking.stdin.flush()

    def _ask(self, order: dict) -> int:
        self._write(order)
        return int(self.forking.stdout.readline())


def wait_until(condition, *, seconds: float = 60, what: str = "it"):
    """Waits until `condition` returns something true, and returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.002)
    raise AssertionError(f"{what} did not happen within {seconds} s")
