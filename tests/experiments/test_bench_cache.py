"""bench cache: rows by hand, what beats static residency, and that synthetic routing says that it is."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from fluxmoe.experiments.bench import cache as bench_cache
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.runtime.experts.cache_policies import POLICIES
from fluxmoe.runtime.experts.recording import Recording, RecordingError


def recording(sequences: int = 2, length: int = 8) -> Recording:
    """One layer of four experts: sequence 0 always chooses expert 0, sequence 1 experts 1, 2 and 3 in turns."""
    step, sequence = (part.ravel() for part in np.mgrid[:length, :sequences].astype(np.int32))
    experts = np.where(sequence == 0, 0, 1 + step % 3).astype(np.int16)[:, None, None]
    return Recording(experts, step, sequence, step, 4, {})


def test_rows_by_hand():
    source = bench_cache.recorded("made", None, 100, recording())
    rows = {
        policy: bench_cache.columns(source, 2, 0.5, policy, 100)
        for policy in (*POLICIES, *bench_cache.RESIDENT, bench_cache.BOUND)
    }
    # Two places: expert 0 always hits where it stays, the others never.
    assert rows["lru"] | {"hit_rate": 0.5, "bytes_per_token": 50.0, "places": 2, "passes": 8} == rows["lru"]
    # Experts 0 and 1 stay: of the second half's passes, 4 to 7, pass 6 uses expert 1 beside 0.
    assert rows["fixed"]["hit_rate"] == (4 + 1) / 8
    assert rows["fixed"]["bytes_per_token"] == 3 * 100 / 8
    assert all(rows[policy]["hit_rate"] <= rows["belady"]["hit_rate"] for policy in POLICIES)
    assert {row["used_per_layer"] for row in rows.values()} == {2.0}


def test_lanes_of_a_batch_of_one_and_the_limit_of_passes():
    source = bench_cache.recorded("made", None, 100, recording())
    assert bench_cache.columns(source, 1, 1.0, "lru", 6)["passes"] == 6
    assert bench_cache.columns(source, 1, 1.0, "lru", 100)["passes"] == 16
    with pytest.raises(RecordingError, match="a batch of 3"):
        source.tokens(3)


def test_crossovers():
    rates = {1: (0.5, 0.4), 8: (0.409, 0.4), 32: (0.3, 0.4)}
    rows = [
        {"source": "m", "skew": "0.0", "share": "0.5", "batch": str(batch), "policy": policy, "hit_rate": str(rate)}
        for batch, (lru, static) in rates.items()
        for policy, rate in {**dict.fromkeys(POLICIES, 0.1), "lru": lru, "static": static, "fixed": 0.3}.items()
    ]
    (line,) = bench_cache.crossovers(rows)
    assert (line["ahead_of_static_to"], line["ahead_of_fixed_to"], line["best_1"]) == (1, 8, "lru")
    assert (line["over_static_32"], line["over_fixed_32"]) == pytest.approx((-0.1, 0.0))


def test_a_recording_is_replayed_once(tmp_path, capsys):
    file, out = tmp_path / "r.npz", tmp_path / "out"
    file.write_bytes(recording().to_bytes())
    arguments = ["bench", "cache", "--recording", str(file), "--expert-bytes", "7", "--batches", "1", "2", "--shares",
                 "0.5", "--out", str(out)]  # fmt: skip
    call(arguments)
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert len(rows) == 2 * (len(POLICIES) + 3)
    assert {row["kind"] for row in rows} == {"recorded"}
    assert json.loads((out / "provenance.json").read_text())["simulated"] is None
    assert (out / "cache.png").stat().st_size > 5000
    call(arguments)
    assert list(csv.DictReader((out / "rows.csv").open())) == rows


def test_a_recording_of_too_few_sequences_is_refused_first(tmp_path):
    file, out = tmp_path / "r.npz", tmp_path / "out"
    file.write_bytes(recording().to_bytes())
    with pytest.raises(RecordingError, match="a batch of 128 needs as many sequences"):
        call(["bench", "cache", "--recording", str(file), "--expert-bytes", "7", "--out", str(out)])
    assert not out.exists()


def test_synthetic_routing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cache, "plot_cache", lambda out: out)
    call(["bench", "cache", "--shapes", "olmoe-1b-7b", "--skews", "0", "--batches", "1", "--shares", "0.5", "--passes",
          "40", "--out", str(tmp_path)])  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {row["kind"] for row in rows} == {"synthetic"}
    assert json.loads((tmp_path / "provenance.json").read_text())["simulated"] == "synthetic routing"
    rates = {row["policy"]: float(row["hit_rate"]) for row in rows}
    # All experts alike, and no reuse: whatever is kept hits as often as its share, but for who knows the future.
    assert all(rates[name] == pytest.approx(0.5, abs=0.04) for name in (*POLICIES, *bench_cache.RESIDENT))
    assert rates["belady"] > 0.7
    each = 3 * 2048 * 1024 * 2
    assert float(rows[0]["bytes_per_token"]) == pytest.approx((1 - rates["next_use"]) * 16 * 8 * each)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give one of --recording, --preset and --shapes"),
        (["--preset", "tiny", "--shapes", "olmoe-1b-7b"], "give one of"),
        (["--preset", "tiny", "--expert-bytes", "8"], "go together"),
        (["--preset", "tiny", "--correlation", "0.5"], "no effect without --shapes"),
        (["--shapes", "olmoe-1b-7b", "--correlation", "1"], "from 0 to below 1"),
        (["--preset", "tiny", "--shares", "0.5", "1.5"], "--shares must be from 0 to 1, got 1.5"),
        (["--preset", "tiny", "--skews", "-1"], "--skews must be from 0 to 3"),
    ],
)
def test_what_has_no_effect_is_refused(arguments, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        call(["bench", "cache", *arguments, "--out", str(tmp_path)])
