"""A process that starts train.py, as many ranks as are asked for, and ends some at a chosen moment.

It reads a JSON list of jobs a line, forks the ranks of each, all at once, and prints their exit codes.
Importing once and forking takes milliseconds where a new Python takes seconds. A job is
    {"argv": of train.py, "ranks": how many, with the environment that torchrun gives them,
     "err": file for what they print, "seconds": after which a timer kills rank 0,
     "event": number of the flush or rename before which rank 0 kills itself,
     "signal": number of a signal that rank job["of"] sends to itself once, in its second call of job["in"],
     "step" or "validate"; in "validate", it then sleeps "seconds_in" seconds,
     "pressed": how often rank 0 gets Ctrl-C, beginning four seconds after its start,
     "pipe": "closed" or "full", the state of standard output and error from then on}
A rank that ends by itself, but leaves processes behind, has the code "left".
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import train
from nanoip2p.training import run_folder as runs
from nanoip2p.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_before(event: int) -> None:
    """Kill this process right before it makes a file durable or gives it its name for the nth time."""
    count = iter(range(1, 10**9))

    def counted(plain):
        def operation(*args):
            if next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args)
        return operation

    runs.flush, os.replace = counted(runs.flush), counted(os.replace)


def spoil_streams(pipe: str) -> None:
    """Standard output and error become a pipe whose reader has gone, or does not read."""
    reading, writing = os.pipe()
    if pipe == "closed":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        try:
            while os.write(writing, bytes(4096)):
                pass
        except BlockingIOError:
            os.set_blocking(writing, True)
    os.dup2(writing, 1)
    os.dup2(writing, 2)


def send_in(job: dict) -> None:
    """Send the signal in the second step, or in a validation that would take long."""
    name = {"step": "update_average", "validate": "validate"}[job["in"]]
    plain, count = getattr(Trainer, name), iter(range(1, 10**9))

    def sending(*args):
        if next(count) == 2:
            if job.get("pipe"):
                spoil_streams(job["pipe"])
            os.kill(os.getpid(), job["signal"])
            if job["in"] == "validate":
                time.sleep(job.get("seconds_in", 60))
        return plain(*args)

    setattr(Trainer, name, sending)


def run(job: dict, rank: int, port: int) -> int:
    """In the child, whose standard output is not for the codes."""
    os.setpgid(0, 0)
    told = os.open(job.get("err", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 1)
    os.dup2(told, 2)
    if job.get("ranks", 1) > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.get("seconds") and rank == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])    # whose signal ends a process at once
    if job.get("event") and rank == 0:
        die_before(job["event"])
    if job.get("pressed") and rank == 0:
        presses = "sleep 4; " + f"kill -INT {os.getpid()}; sleep 0.3; " * job["pressed"]
        subprocess.Popen(presses, shell=True, start_new_session=True)
    if job.get("signal") and rank == job.get("of", 0):
        send_in(job)
    return train.main(job["argv"])


STOPPED = []  # ranks that a signal has stopped, which are killed when the others have ended


def ended(child: int) -> int | str:
    """Wait until a rank ends or is stopped, and return how."""
    status = os.waitpid(child, os.WUNTRACED)[1]
    if os.WIFSTOPPED(status):
        STOPPED.append(child)
        return "stopped"
    code = os.waitstatus_to_exitcode(status)
    try:
        os.killpg(child, 0)
    except ProcessLookupError:
        return code
    return "left" if code >= 0 else code  # those of a killed rank end some seconds later


def main() -> None:
    torch.set_num_threads(1)
    torch.nn.Embedding(1, 1, device="meta")  # the first of its kind imports for seconds, as those below
    for name in ("torch._dynamo", "torch.distributed.optim", "matplotlib.pyplot"):
        importlib.import_module(name)
    train.VALIDATION_SAMPLES = 8
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            port = free_port()
            children.append([])
            for rank in range(job.get("ranks", 1)):
                children[-1].append(os.fork())
                if children[-1][-1] == 0:
                    code = 1
                    try:
                        code = run(job, rank, port)
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(code)
        codes = [[ended(child) for child in ranks] for ranks in children]
        for child in STOPPED:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        STOPPED.clear()
        print(json.dumps(codes), flush=True)


OCCUPY = """
import os, sys
from pathlib import Path
from nanoip2p.training import run_folder as runs
with runs.occupied(Path(sys.argv[1])):
    if os.fork():
        print("at it", flush=True)
    sys.stdin.read()
"""


@contextmanager
def occupying(folder: Path):
    """A process that holds a run's folder, with a child as those that load data; both end with the block."""
    process = subprocess.Popen([sys.executable, "-c", OCCUPY, folder], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "at it\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()


class Server:
    """The other end: `server(job, ...)` returns the exit codes of the ranks of each job."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def __call__(self, *jobs: dict) -> list[list[int]]:
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    main()
