"""A process that runs train.py in forked processes, the ranks, and ends ranks at a chosen moment.

Each input line is a JSON list of jobs. The process runs them at once, and prints the exit codes of their
ranks. It imports torch once, which takes seconds; a fork takes milliseconds. A job is
    {"argv": the flags of train.py,
     "ranks": number of ranks, which get the environment that torchrun would give them (default: 1),
     "torchrun": true: torchrun's own code forks the ranks; the job has one exit code, torchrun's,
     "err": file for all output,
     "seconds": time after which a timer kills rank 0,
     "event": number of the flush or rename before which rank 0 kills itself,
     "signal": number of a signal that rank job["of"] (default: 0) sends once, in its second step or
         validation, as job["in"] says. In a validation, the rank then sleeps "seconds_in" seconds,
     "parent": true: the signal goes to torchrun; otherwise to the rank itself,
     "pipe": "closed" or "full", the state of standard output and error from the signal on,
     "pressed": how many Ctrl-C rank 0 gets after the signal}
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
from PIL import Image
from torch.distributed import run as torchrun

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
    """Replace standard output and error by a pipe whose reader has closed it, or does not read."""
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


def send_in(job: dict, first: int) -> None:
    """Let rank job["of"] send the signal in its second step, or in a validation that takes long."""
    name = {"step": "update_average", "validate": "validate"}[job["in"]]
    plain, count = getattr(Trainer, name), iter(range(1, 10**9))

    def sending(*args):
        if next(count) == 2 and int(os.environ.get("RANK", 0)) == job.get("of", 0):
            if job.get("pipe"):
                spoil_streams(job["pipe"])
            if job.get("pressed"):
                presses = "sleep 1; " + f"kill -INT {first}; sleep 0.3; " * job["pressed"]
                subprocess.Popen(presses, shell=True, start_new_session=True)
            os.kill(os.getppid() if job.get("parent") else os.getpid(), job["signal"])
            if job["in"] == "validate":
                time.sleep(job.get("seconds_in", 60))
        return plain(*args)

    setattr(Trainer, name, sending)


def run(job: dict, rank: int, port: int, first: int) -> int:
    """Run a rank of a job, or torchrun, in a forked process. first: process id of rank 0."""
    os.setpgid(0, 0)
    told = os.open(job.get("err", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 1)
    os.dup2(told, 2)
    if job.get("signal"):
        send_in(job, first)
    if "event" not in job:
        runs.plot_log = lambda run: True  # loss.png takes as long as a short run
    if job.get("torchrun"):
        torchrun.main(["--nproc-per-node", str(job["ranks"]), "--master-port", str(port), "--start-method",
                       "fork", "--run-path", str(ROOT / "train.py"), *job["argv"]])
        return 0
    if job.get("ranks", 1) > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.get("seconds") and rank == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # SIGALRM then ends the process
    if job.get("event") and rank == 0:
        die_before(job["event"])
    return train.main(job["argv"])


STOPPED = []  # ranks that a signal has stopped; `main` kills them when the other ranks have ended


def ended(child: int) -> int | str:
    """Wait until a rank ends or is stopped. Returns its exit code, "left" or "stopped"."""
    status = os.waitpid(child, os.WUNTRACED)[1]
    if os.WIFSTOPPED(status):
        STOPPED.append(child)
        return "stopped"
    code = os.waitstatus_to_exitcode(status)
    try:
        os.killpg(child, 0)
    except ProcessLookupError:
        return code
    return "left" if code >= 0 else code  # the children of a killed rank end some seconds later


def main() -> None:
    torch.set_num_threads(1)
    torch.nn.Embedding(1, 1, device="meta")  # the first one imports modules for seconds, as the next line
    for name in ("torch._dynamo", "torch.distributed.optim", "nanoip2p.training.cache"):
        importlib.import_module(name)
    Image.init()  # imports what reads each kind of picture
    train.VALIDATION_SAMPLES = 8
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            port = free_port()
            children.append([])
            for rank in range(1 if job.get("torchrun") else job.get("ranks", 1)):
                children[-1].append(os.fork())
                if children[-1][-1] == 0:
                    code = 1
                    try:
                        code = run(job, rank, port, children[-1][0] or os.getpid())
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
from nanoip2p.common import files
with files.locked(Path(sys.argv[1]) / ".lock"):
    if os.fork():
        print("at it", flush=True)
    sys.stdin.read()
"""


@contextmanager
def occupying(folder: Path):
    """A process that locks a run's folder. It has a child, like a data loader; both end with the block.

    It locks as run_folder.occupied does, but does not import torch, which takes seconds.
    """
    process = subprocess.Popen([sys.executable, "-c", OCCUPY, folder], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "at it\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()


class Server:
    """The client of this process: `server(job, ...)` returns the exit codes of the ranks of each job."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def __call__(self, *jobs: dict) -> list[list[int]]:
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        with self.process:  # which then waits, and closes the pipes
            self.process.kill()  # Python's own clean-up would take seconds


if __name__ == "__main__":
    main()
