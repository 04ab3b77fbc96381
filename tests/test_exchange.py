"""The fate of a message is the same on all ranks, whoever is late; and nobody's training waits for it."""

import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed

from stethoscope._errands import Errands
from stethoscope._exchange import Exchange
from stethoscope._mail import Listener, Post
from stethoscope._parts import Notes
from stethoscope._protocols import Run
from stethoscope._record import Finding


@pytest.fixture
def pair():
    """Two ranks in one process, and their store."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    ranks = [Exchange(distributed.PrefixStore("test", store.clone()), rank, 2) for rank in (0, 1)]
    yield ranks
    for rank in ranks:
        rank.close()


def send(exchange, value):
    largest, total = torch.tensor([value], dtype=torch.float64), torch.tensor([value], dtype=torch.float64)
    future = Errands("rank").run(lambda: (exchange.send(largest, total).fate, largest.item(), total.item()))
    return lambda: future.result(10)


def test_a_message_to_which_all_have_come_holds_the_numbers_of_all(pair):
    for value in (1.0, 5.0):
        first, second = send(pair[0], value), send(pair[1], 2.0)
        assert first() == second() == ("together", max(value, 2.0), value + 2.0)


def test_who_does_not_wait_decides_for_all_and_the_next_message_is_combined_again(pair):
    first = send(pair[0], 1.0)
    time.sleep(0.1)
    pair[0].hurry(True)
    assert first() == ("apart", 1.0, 1.0)
    assert send(pair[1], 2.0)() == ("apart", 2.0, 2.0)
    pair[0].hurry(False)
    first, second = send(pair[0], 3.0), send(pair[1], 4.0)
    assert first() == second() == ("together", 4.0, 7.0)


def test_who_closes_is_told_to_those_that_wait_and_to_those_that_come_later(pair):
    waiting = send(pair[0], 1.0)
    time.sleep(0.1)
    pair[1].close()
    assert waiting()[0] == "closed"
    assert send(pair[0], 1.0)()[0] == "closed"


def test_a_rank_that_was_given_up_and_closes_is_found_by_those_that_are_ahead(pair):
    pair[0].hurry(True)
    for _ in range(3):
        assert send(pair[0], 1.0)()[0] == "apart"
    pair[0].hurry(False)
    waiting = send(pair[0], 1.0)
    time.sleep(0.1)
    pair[1].close()
    assert waiting()[0] == "closed"


class Hangs:
    """A store that does not answer."""

    def __init__(self):
        self.released = threading.Event()

    def add(self, key, number):
        self.released.wait(10)
        raise RuntimeError("Timed out")


def test_a_store_that_hangs_holds_up_neither_findings_nor_steps():
    hangs, errands = Hangs(), Errands("rank")
    finding = Finding("nonfinite-loss", "error", "The loss is NaN.", "Look.", step=3)
    post, listener = Post(errands, store=hangs), Listener(Notes(strict=True), errands, store=hangs)
    began = time.monotonic()
    post.open(Run("a", ""))
    post.write(3, [], [finding])
    for _ in range(100):
        listener.listen([])
    assert time.monotonic() - began < 0.5
    hangs.released.set()
    post.close()


def test_an_errand_returns_what_it_finds_and_raises_what_it_meets():
    errands = Errands("rank")
    assert errands.run(lambda: 3).result(5) == 3
    with pytest.raises(ZeroDivisionError):
        errands.run(lambda: 1 / 0).result(5)
    assert errands.run(lambda: threading.current_thread().daemon).result(5)


def test_a_thread_of_errands_ends_with_its_owner():
    errands = Errands("stethoscope-ends")
    errands.run(lambda: None).result(5)
    thread = next(each for each in threading.enumerate() if each.name == "stethoscope-ends")
    del errands
    thread.join(5)
    assert not thread.is_alive()
