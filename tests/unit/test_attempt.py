"""Which start of a run owns it: claims count up, the last one wins, and there is never more than one owner."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifar_dist.errors import UserError
from cifar_dist.run.ownership import Attempts
from cifar_dist.storage import Folder

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"


@pytest.fixture(params=["path", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(request.getfixturevalue("s3_uri") if request.param == "s3" else str(tmp_path / "run"))


def owns(attempts: Attempts, number: int) -> bool:
    try:
        attempts.check(number)
    except UserError:
        return False
    return True


# One after the other.


def test_claims_count_up(run):
    attempts = Attempts(run, A)
    assert attempts.newest() == (0, "")
    assert [attempts.claim(takeover=True) for _ in range(3)] == [1, 2, 3]
    assert [attempts.claim(takeover=False) for _ in range(2)] == [4, 5]
    assert attempts.newest() == (5, A)
    attempts.check(5)


def test_an_earlier_claim_of_the_same_driver_is_void(run):
    """Workers that Ray Train has replaced may still be alive."""
    attempts = Attempts(run, A)
    first, second = attempts.claim(takeover=True), attempts.claim(takeover=False)
    attempts.check(second)
    with pytest.raises(UserError, match="taken over as attempt 2"):
        attempts.check(first)


@pytest.mark.parametrize(("older", "newer"), [(A, B), (B, A)])
def test_a_newer_driver_takes_over_and_the_older_one_is_refused(run, older, newer):
    """Whichever of their names is greater."""
    old, new = Attempts(run, older), Attempts(run, newer)
    number = old.claim(takeover=True)
    old.check(number)
    taken = new.claim(takeover=True)
    assert taken == number + 1
    new.check(taken)
    before = run.names("attempts")
    for refused in (lambda: old.check(number), lambda: old.claim(takeover=False), lambda: old.check(taken)):
        with pytest.raises(UserError) as error:
            refused()
        text = str(error.value)
        assert "\n" not in text
        for part in (run.uri, "attempt 2", f"process {os.getpid()} on {socket.gethostname()}", "--name"):
            assert part in text
    assert run.names("attempts") == before
    assert new.newest() == (taken, newer)
    assert owns(new, taken)


def test_the_refusal_names_the_process_that_took_over(tmp_path):
    """Another process than this one."""
    run = Folder(str(tmp_path))
    old = Attempts(run, B)
    number = old.claim(takeover=True)
    script = (
        "import os, sys; from cifar_dist.storage import Folder; from cifar_dist.run.ownership import Attempts; "
        "print(os.getpid(), Attempts(Folder(sys.argv[1]), sys.argv[2]).claim(takeover=True))"
    )
    done = subprocess.run([sys.executable, "-c", script, run.uri, A], capture_output=True, text=True, check=True)
    process, taken = done.stdout.split()
    assert (process, taken) != (str(os.getpid()), "1")
    with pytest.raises(UserError, match=f"taken over as attempt 2 by process {process} on {socket.gethostname()} at"):
        old.check(number)


def test_a_driver_that_was_taken_over_can_be_started_again(run):
    old, new = Attempts(run, A), Attempts(run, B)
    first, second = old.claim(takeover=True), new.claim(takeover=True)
    third = Attempts(run, C).claim(takeover=True)
    assert (first, second, third) == (1, 2, 3)
    assert not owns(old, first)
    assert not owns(new, second)
    assert owns(Attempts(run, C), third)


@pytest.mark.parametrize("card", ["", "{", "[]", "{}", '{"pid": 1}'])
def test_a_claim_counts_even_if_its_card_is_damaged(tmp_path, card):
    run = Folder(str(tmp_path))
    number = Attempts(run, A).claim(takeover=True)
    taken = Attempts(run, B).claim(takeover=True)
    (tmp_path / "attempts" / f"{taken:06d}-{B}.json").write_text(card)
    with pytest.raises(UserError, match="taken over as attempt 2 by another job"):
        Attempts(run, A).check(number)
    Attempts(run, B).check(taken)


def test_what_is_no_claim_does_not_count(tmp_path):
    """Such as the temporary name of a claim that was being written when its process was killed."""
    run = Folder(str(tmp_path))
    attempts = Attempts(run, A)
    number = attempts.claim(takeover=True)
    for name in (f"000007-{B}.json.1a2b3c4d.tmp", ".nfs0001", "notes.json", f"7-{B}.json", "000007-nohexhere.json"):
        (tmp_path / "attempts" / name).write_text("{}")
    attempts.check(number)
    assert attempts.claim(takeover=False) == number + 1


def test_numbers_beyond_six_digits_are_still_in_order(tmp_path):
    run = Folder(str(tmp_path))
    run.create("attempts")
    run.write(f"attempts/999999-{B}.json", b"{}")
    assert Attempts(run, A).claim(takeover=True) == 1_000_000
    assert Attempts(run, A).claim(takeover=False) == 1_000_001


def test_a_card_says_who_and_when(tmp_path):
    number = Attempts(Folder(str(tmp_path)), A).claim(takeover=True)
    card = json.loads((tmp_path / "attempts" / f"{number:06d}-{A}.json").read_text())
    assert (card["attempt"], card["host"], card["pid"]) == (number, socket.gethostname(), os.getpid())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", card["time"])


# At the same time.


class Interrupted(Folder):
    """Between a claimant's look and its claim another driver claims the run."""

    other = ""

    def create(self, name: str = "") -> None:
        if self.other:
            other, self.other = self.other, ""
            Attempts(Folder(self.uri), other).claim(takeover=True)
        super().create(name)


@pytest.mark.parametrize(("late", "early", "expected"), [(A, B, 3), (B, A, 3)])
def test_a_claim_that_takes_over_looks_again_until_it_owns_the_run(tmp_path, late, early, expected):
    """Who finds another claim of its number goes on to the next one: no two attempts have the same number."""
    run = Interrupted(str(tmp_path))
    Attempts(run, C).claim(takeover=True)
    run.other = early
    number = Attempts(run, late).claim(takeover=True)
    assert number == expected
    Attempts(run, late).check(number)
    assert not owns(Attempts(run, early), 2)


def test_workers_that_start_again_give_up_if_the_run_is_taken_over_at_that_moment(tmp_path):
    run = Interrupted(str(tmp_path))
    number = Attempts(run, A).claim(takeover=True)
    run.other = B
    with pytest.raises(UserError, match="taken over as attempt 2"):
        Attempts(run, A).claim(takeover=False)
    assert not owns(Attempts(run, A), number)
    Attempts(run, B).check(2)


def claim_together(uri: str, claims: dict[str, bool]) -> dict[str, int]:
    """The drivers claim at once, each in a thread: driver -> number of those that were not refused."""
    barrier = threading.Barrier(len(claims))

    def claim(driver: str, takeover: bool) -> int | None:
        attempts = Attempts(Folder(uri), driver)
        barrier.wait()
        try:
            return attempts.claim(takeover)
        except UserError:
            if takeover:
                raise
            return None

    with ThreadPoolExecutor(len(claims)) as pool:
        numbers = dict(zip(claims, pool.map(claim, claims, claims.values()), strict=True))
    return {driver: number for driver, number in numbers.items() if number is not None}


def new_run(uri: str) -> Folder:
    """Its folder of claims is there: test_storage.py lists one that is being created."""
    run = Folder(uri)
    run.create("attempts")
    return run


def assert_one_owner(run: Folder, numbers: dict[str, int]) -> None:
    owners = [driver for driver, number in numbers.items() if owns(Attempts(run, driver), number)]
    assert [(numbers[driver], driver) for driver in owners] == [Attempts(run, "").newest()]


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads take turns after microseconds, so that each order of their steps comes up in some round."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_switched")
@pytest.mark.parametrize(("drivers", "rounds"), [([A, B], 15), ([B, A, C], 10)])
def test_of_drivers_that_claim_at_the_same_time_one_is_the_owner(tmp_path, drivers, rounds):
    for number in range(rounds):
        run = new_run(str(tmp_path / f"run-{number}"))
        numbers = claim_together(run.uri, dict.fromkeys(drivers, True))
        assert numbers.keys() == set(drivers)
        assert_one_owner(run, numbers)


@pytest.mark.usefixtures("often_switched")
@pytest.mark.parametrize(("older", "newer"), [(A, B), (B, A)])
def test_one_owner_is_left_when_workers_start_again_while_the_run_is_taken_over(tmp_path, older, newer):
    for number in range(12):
        run = Folder(str(tmp_path / f"run-{number}"))
        Attempts(run, older).claim(takeover=True)
        assert_one_owner(run, claim_together(run.uri, {older: False, newer: True}))


def test_of_drivers_that_claim_at_the_same_time_in_a_bucket_one_is_the_owner(s3):
    for number in range(8):
        run = new_run(f"s3://bucket/claimed-together/run-{number}{s3}")
        assert_one_owner(run, claim_together(run.uri, {A: True, B: True}))


def claim_in_rounds(folder: str, driver: str, rounds: int, barrier, results) -> None:
    for number in range(rounds):
        attempts = Attempts(new_run(f"{folder}/run-{number}"), driver)
        barrier.wait(60)
        results.put((number, driver, attempts.claim(takeover=True)))


def test_of_processes_that_claim_at_the_same_time_one_is_the_owner(tmp_path):
    rounds, context = 15, multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = [(str(tmp_path), driver, rounds, barrier, results) for driver in (A, B)]
    processes = [context.Process(target=claim_in_rounds, args=args) for args in arguments]
    for process in processes:
        process.start()
    found: dict[int, dict[str, int]] = {number: {} for number in range(rounds)}
    for _ in range(2 * rounds):
        number, driver, claimed = results.get(timeout=60)
        found[number][driver] = claimed
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for number, numbers in found.items():
        assert_one_owner(Folder(str(tmp_path / f"run-{number}")), numbers)


def test_attempts_that_were_removed_are_not_taken_for_another_driver(run):
    attempts = Attempts(run, A)
    number = attempts.claim(takeover=True)
    run.delete("attempts")
    with pytest.raises(UserError, match=r"attempts.* was removed while the run went on") as error:
        attempts.check(number)
    assert "taken over" not in str(error.value)
    attempts.check_driver()  # nobody else owns it
