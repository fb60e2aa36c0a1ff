"""profile_hardware: a valid, measured profile that the loader reads back."""

from __future__ import annotations

from fluxmoe.experiments.commands import profile_hardware
from fluxmoe.runtime.hardware import HardwareProfile


def test_measures_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile_hardware, "_SIZES", (64 << 10, 1 << 20))
    monkeypatch.setattr(profile_hardware, "FULL", profile_hardware.Effort(8 << 20, 32 << 20))
    profile_hardware.main(["--device", "cpu", "--disk-dir", str(tmp_path), "--out", str(tmp_path / "p.json")])
    profile = HardwareProfile.load(tmp_path / "p.json")
    assert profile.measured
    assert profile.device == "cpu"
    assert 0 <= profile.copy_overlap <= 1
    assert profile.decode_bandwidth.keys() == {"planar12", "tiered", "huffman"}
    assert profile.provenance["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    assert "disk" in capsys.readouterr().out
