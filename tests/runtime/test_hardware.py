"""Profiles: the shipped ones are whole and say where their numbers are from; bad ones are refused in a sentence."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.footprint import lay_out
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.hardware import HardwareProfile, ProfileError, list_profiles, measure_bandwidths


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profiles_say_where_their_numbers_are_from(name):
    profile = HardwareProfile.load(name)
    assert profile.name == name
    assert not profile.measured
    assert "memory_bandwidth" in profile.sources
    assert profile.decode_bandwidth.keys() == {"planar12", "tiered", "huffman"}
    assert profile.host_bandwidth < profile.memory_bandwidth


def test_round_trip(tmp_path):
    profile = HardwareProfile.load("4xL40")
    (tmp_path / "mine.json").write_text(json.dumps(profile.to_json()))
    assert HardwareProfile.load(tmp_path / "mine.json") == profile


def test_placement_reads_it():
    profile = HardwareProfile.load("H100-SXM")
    fused, decoded = profile.bandwidths(), profile.bandwidths("huffman")
    assert fused[Tier.PACKED] == fused[Tier.RESIDENT] > decoded[Tier.PACKED] > decoded[Tier.HOST]
    shares = [place("balanced", 4, 100, device_tier=Tier.PACKED, bandwidths=b).alpha for b in (fused, decoded)]
    assert 1 > shares[0] > shares[1] > 0.8


def test_devices_share_the_host():
    values = HardwareProfile.load("4xL40").to_json()
    assert HardwareProfile.from_json(values).host_bandwidth_each == values["host_bandwidth"]
    assert HardwareProfile.from_json(values | {"host_link_shared": 40e9}).host_bandwidth_each == 10e9


def test_several_of_a_device(tmp_path):
    for name in ("H100-SXM×4", "H100-SXMx4"):
        four = HardwareProfile.load(name)
        assert (four.name, four.num_devices) == ("H100-SXM×4", 4)
        assert four.memory_bandwidth == HardwareProfile.load("H100-SXM").memory_bandwidth
    shared = HardwareProfile.from_json(HardwareProfile.load("4xL40").to_json() | {"host_link_shared": 40e9})
    assert shared.of_devices(2).host_bandwidth_each == shared.host_bandwidth_each == 10e9
    with pytest.raises(ProfileError, match="laptop has no link_bandwidth; 2 devices"):
        HardwareProfile.load("laptop×2")
    with pytest.raises(ProfileError, match="at least one device, got 0"):
        HardwareProfile.load("H100-SXM×0")
    mine = tmp_path / "mybox2"
    mine.write_text(json.dumps(HardwareProfile.load("laptop").to_json()))
    assert HardwareProfile.load(mine).num_devices == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"memory_bandwidth": -1}, "memory_bandwidth must be positive, got -1"),
        ({"matmul_flops": float("nan")}, "matmul_flops must be positive"),
        ({"matmul_flops": "fast"}, "matmul_flops must be positive, got 'fast'"),
        ({"num_devices": 0}, "num_devices must be positive"),
        ({"decode_bandwidth": {"huffman": -2}}, "huffman must not be negative"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"copy_overlap": 1.5}, "copy_overlap must be from 0 to 1, got 1.5"),
        ({"colour": 1}, "unknown field 'colour'"),
    ],
)
def test_invalid_values_are_refused(change, match):
    values = HardwareProfile.load("laptop").to_json() | change
    with pytest.raises(ProfileError, match=match):
        HardwareProfile.from_json(values)


def test_missing_fields_and_files_are_refused(tmp_path):
    values = HardwareProfile.load("laptop").to_json()
    values.pop("disk_bandwidth")
    with pytest.raises(ProfileError, match="'disk_bandwidth' is missing"):
        HardwareProfile.from_json(values)
    with pytest.raises(ProfileError, match=r"no hardware profile 'B9000': .*4xL40"):
        HardwareProfile.load("B9000")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ProfileError, match="no JSON"):
        HardwareProfile.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ProfileError, match="holds no profile"):
        HardwareProfile.load(tmp_path / "list.json")


def test_quick_measurement_covers_both_tiers_and_files(tmp_path):
    rates = measure_bandwidths(torch.device("cpu"))
    assert rates.keys() == {Tier.RESIDENT, Tier.HOST}
    assert all(1e8 < rate < 1e13 for rate in rates.values())
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert 0 < measure_bandwidths(torch.device("cpu"), [tmp_path / "file"])[Tier.DISK] < 1e13


def test_a_measurement_takes_little_of_what_a_wall_leaves(monkeypatch):
    """128 MiB three times killed processes behind walls of 600 MiB."""
    taken, ones = list[int](), torch.ones

    def counted(count: int, **how: Any) -> torch.Tensor:
        taken.append(8 * count)
        return ones(count, **how)

    monkeypatch.setattr(type(HOST), "free_bytes", lambda self: 256 << 20)
    monkeypatch.setattr(torch, "ones", counted)
    measure_bandwidths(torch.device("cpu"))
    assert sum(taken) <= 32 << 20


def test_shares_by_bandwidth_know_that_a_link_is_held():
    sizes = SimpleNamespace(
        dims=SimpleNamespace(experts=12), fused_formats=frozenset[str](), expert_bytes=lambda name: (64, 64)
    )
    rates = {Tier.RESIDENT: 6.0, Tier.HOST: 9.0, Tier.DISK: 1.0}
    for link, host, disk in ((None, 7, 1), (2.0, 3, 1), (1.0, 1, 2)):
        config = PagingConfig(placement="three_tiers", link_bandwidth=link)
        counts = lay_out(1, config, cast(Any, sizes), lambda: rates).placement.counts()
        assert (counts["host"], counts["disk"]) == (host, disk), link
