from pathlib import Path

import pytest

from benchmarks import tuning
from benchmarks.tables import Subject
from benchmarks.tuning import Search, searches


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a search append a line for its number of trials to its log; return the numbers searched so far."""
    counts: list[int] = []

    def tune(_subject: Subject, log: Path, trials: int, _threads: int, _target: str) -> Search:
        counts.append(trials)
        log.mkdir(exist_ok=True)
        with (log / "records").open("a") as records:
            records.write(f"{trials}\n")
        return Search(trials, 1, 10.0)

    monkeypatch.setattr(tuning, "_tune", tune)
    return counts


def test_a_search_goes_on_from_the_one_of_fewer_trials(tuned: list[int], tmp_path: Path) -> None:
    (_, first), (log, second) = searches(Subject("model", tmp_path, {}), tmp_path, (256, 64), 2, "host")
    assert (log / "records").read_text() == "64\n256\n"
    assert (first.seconds, second.seconds) == (10.0, 20.0)
    assert tuned == [64, 256]


def test_what_a_folder_holds_is_not_searched_again(tuned: list[int], tmp_path: Path) -> None:
    subject = Subject("model", tmp_path, {})
    before = list(searches(subject, tmp_path, (64,), 2, "host"))
    after = list(searches(subject, tmp_path, (64, 256), 2, "host"))
    assert tuned == [64, 256]
    assert after[:1] == before


def test_an_interrupted_search_is_made_again_from_its_start(tuned: list[int], tmp_path: Path) -> None:
    (tmp_path / "64").mkdir()
    (tmp_path / "64" / "records").write_text("cut off\n")
    ((log, _),) = searches(Subject("model", tmp_path, {}), tmp_path, (64,), 2, "host")
    assert (log / "records").read_text() == "64\n"
    assert tuned == [64]
