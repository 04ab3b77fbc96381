"""Worlds of real processes. One world of each size is started per session; scenarios that kill a rank start their own."""

import json
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class World:
    """Processes that run scenarios together.

    Args:
        size: number of ranks.
        log: where standard error goes.
    """

    def __init__(self, size, log):
        self.size, self.log = size, log
        self.launch()

    def launch(self):
        size = self.size
        self.logs = [(self.log / f"{rank}.log").open("a") for rank in range(size)]
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(HERE / "rank.py"), str(rank), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.logs[rank],
                text=True,
            )
            for rank in range(size)
        ]

    def start(self, function, *, backend="gloo", **arguments):
        """Start a scenario on all ranks. A world that an earlier test has stopped begins anew."""
        if not self.ranks:
            self.launch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = {"function": function.__name__, "file": function.__code__.co_filename, "port": port}
        for process in self.ranks:
            process.stdin.write(json.dumps(line | {"backend": backend, "arguments": arguments}) + "\n")
            process.stdin.flush()

    def answer(self, rank, timeout=180):
        """Wait for what a rank returns."""
        process = self.ranks[rank]
        if not select.select([process.stdout], [], [], timeout)[0]:
            self.stop()
            pytest.fail(f"Rank {rank} did not return within {timeout} s.")
        text = process.stdout.readline()
        assert text, f"Rank {rank} has died: {(self.log / f'{rank}.log').read_text()[-2000:]}"
        answer = json.loads(text)
        assert "error" not in answer, answer.get("error")
        return answer["result"]

    def run(self, function, **arguments):
        """Run a scenario and return what each rank returns."""
        self.start(function, **arguments)
        return [self.answer(rank) for rank in range(self.size)]

    def stop(self):
        for process in self.ranks:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        for log in self.logs:
            log.close()
        self.ranks = []


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """A world of two ranks."""
    world = World(2, tmp_path_factory.mktemp("two"))
    yield world
    world.stop()


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    """A world of four ranks."""
    world = World(4, tmp_path_factory.mktemp("four"))
    yield world
    world.stop()


@pytest.fixture
def new_world(tmp_path):
    """Make worlds that may be broken."""
    made = []

    def make(size):
        made.append(World(size, tmp_path))
        return made[-1]

    yield make
    for world in made:
        world.stop()
