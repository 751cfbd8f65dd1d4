"""An error of one rank is the error of all ranks, and says whose it is."""

from dataclasses import dataclass
from threading import Barrier, Thread

import pytest

from simmim_scale.cli.together import data_errors, on_every_rank, on_main
from simmim_scale.train.ahead import LoadingError

RANKS = 3


@dataclass
class Ranks:
    """Threads that stand for ranks: the two collectives that the functions use."""

    rank: int
    barrier: Barrier
    board: list

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_objects(self, value):
        self.board[self.rank] = value
        self.barrier.wait(10)
        return list(self.board)

    def broadcast_object(self, value):
        return self.gather_objects(value)[0]


def run(action) -> list:
    """What each rank got back: a value, or the message of its ValueError."""
    barrier, board, results = Barrier(RANKS), [None] * RANKS, [None] * RANKS

    def one(rank: int) -> None:
        try:
            results[rank] = action(Ranks(rank, barrier, board))
        except ValueError as error:
            results[rank] = f"error: {error}"

    threads = [Thread(target=one, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def fail(message: str):
    raise ValueError(message)


def test_every_rank_gets_its_own_result():
    assert run(lambda ranks: on_every_rank(ranks, lambda: ranks.rank * 10)) == [0, 10, 20]


def test_one_failing_rank_stops_all_and_is_named():
    results = run(lambda ranks: on_every_rank(ranks, lambda: fail("no shards here") if ranks.rank == 2 else 1))
    assert results == ["error: on rank 2: no shards here"] * RANKS


def test_the_same_error_everywhere_is_said_once():
    assert run(lambda ranks: on_every_rank(ranks, lambda: fail("typo"))) == ["error: typo"] * RANKS


def test_different_errors_are_all_said():
    results = run(lambda ranks: on_every_rank(ranks, lambda: fail(f"disk of {ranks.rank // 2}")))
    assert results == ["error: on rank 0, 1: disk of 0\non rank 2: disk of 1"] * RANKS


def test_the_main_rank_acts_alone():
    assert run(lambda ranks: on_main(ranks, lambda: "lock")) == ["lock", None, None]
    assert run(lambda ranks: on_main(ranks, lambda: fail("taken"))) == ["error: taken"] * RANKS


def test_other_errors_are_not_swallowed():
    ranks = Ranks(0, Barrier(1), [None])
    with pytest.raises(ZeroDivisionError):
        on_every_rank(ranks, lambda: 1 // 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_images_that_cannot_be_read_end_a_command_with_code_4(rank, caplog):
    with pytest.raises(SystemExit) as ended, data_errors(Ranks(rank, Barrier(1), [None])):
        raise LoadingError("val-3.tar: not read after 8 attempts")
    assert ended.value.code == 4
    assert ("the images cannot be read: val-3.tar: not read after 8 attempts" in caplog.text) == (rank == 0)
