"""profile_hardware: a valid, measured profile that the loader reads back."""

from __future__ import annotations

from fluxmoe.experiments.commands import profile
from fluxmoe.experiments.commands.main import call
from fluxmoe.runtime.hardware import HardwareProfile


def test_measures_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "_SIZES", (64 << 10, 1 << 20))
    monkeypatch.setattr(profile, "FULL", profile.Effort(8 << 20, 32 << 20))
    call(["profile", "--device", "cpu", "--disk-dir", str(tmp_path), "--out", str(tmp_path / "p.json")])
    found = HardwareProfile.load(tmp_path / "p.json")
    assert found.measured
    assert found.device == "cpu"
    assert 0 <= found.copy_overlap <= 1
    assert found.decode_bandwidth.keys() == {"planar12", "planar8", "tiered", "huffman"}
    assert found.provenance["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    assert "disk" in capsys.readouterr().out
