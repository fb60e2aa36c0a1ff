"""What a user is told: at start where experts lie and what that frees, at the end what was served."""

from __future__ import annotations

from fluxmoe.kernels.formats import DENSE

from ..experts.pager import ExpertPager
from ..experts.placement import Tier
from ..experts.streamer import Counters
from ..memory.budget import format_bytes


def dense_bytes(pager: ExpertPager) -> int:
    """What all experts would take without us."""
    return pager.footprint.layout.placement.tiers.size * sum(pager.ops.expert_bytes(DENSE))


def taken_bytes(pager: ExpertPager) -> int:
    """Of the device's memory; on a CPU both tiers are the same memory."""
    host = pager.host_lines() if pager.device.is_host else {}
    return sum(pager.lines().values()) + sum(nbytes for line, nbytes in host.items() if line != "staging")


def placement_table(pager: ExpertPager) -> str:
    """One row a tier that holds experts, then cache, slots and workspace, then what of the device's memory is free that
    dense experts would take."""
    layout, lines = pager.footprint.layout, pager.lines()
    counts = pager.placement.counts()
    rows = [("experts", "where", "format", "bytes")]
    for tier in Tier:
        if number := counts[tier.name.lower()]:
            rows.append((str(number), _WHERE[tier], layout.stored(tier), format_bytes(layout.tier_bytes(tier))))
    if layout.cached:
        places = pager.footprint.cache_places()
        cache = f"cache of {places} experts" if places < layout.cached else "cache of all that are in a file"
        rows.append(("", cache, layout.stored(Tier.DISK), format_bytes(lines["expert_cache"])))
    slots = "streaming slots" if lines["slots"] else "no streaming slots"
    rows += [("", slots, "", format_bytes(lines["slots"])), ("", "workspace", "", format_bytes(lines["workspace"]))]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        "  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), row[3].rjust(widths[3])])
        for row in rows
    ]
    dense, taken = dense_bytes(pager), taken_bytes(pager)
    free = f"{format_bytes(dense - taken)} are free for KV cache" if taken < dense else "no more is free than then"
    table.append(
        f"dense, the experts would take {format_bytes(dense)} of the device's memory; now, with slots and workspace, "
        f"{format_bytes(taken)} are taken: {free}"
    )
    return "\n".join(table)


def kv_cache(tokens: int, kv_bytes: int, freed_bytes: int, fixed: bool) -> str:
    """How much KV there is and would be without us, whose `freed_bytes` it would lack. fixed: a user said how much."""
    if fixed:
        return f"KV cache of {tokens:,} tokens, with and without fluxmoe: its size was given"
    without = kv_bytes - freed_bytes
    if without <= 0:
        more = format_bytes(-without)
        return (
            f"KV cache of {tokens:,} tokens; without fluxmoe none: weights would take about {more} more than there is"
        )
    return f"KV cache of {tokens:,} tokens; without fluxmoe about {tokens * without // kv_bytes:,} in the same memory"


_WHERE = {
    Tier.RESIDENT: "device",
    Tier.PACKED: "device, compressed",
    Tier.HOST: "host memory",
    Tier.DISK: "file",
}


def served(c: Counters) -> str:
    """What crossed to the device since the start, what the cache spared, and what passes waited for it."""
    asked = c.cache_hits + c.cache_misses
    cache = f"; of {asked} routed experts of files, {c.cache_hits} were in the cache" if asked else ""
    return (
        f"{c.loads} loads brought {format_bytes(c.host_bytes)} from host memory and {format_bytes(c.disk_bytes)} from "
        f"disk in {c.transfer_ns / 1e9:.2f} s, for which passes waited {c.stall_ns / 1e9:.2f} s; kernels read "
        f"{format_bytes(c.on_demand_bytes)} of host memory in place{cache}"
    )
