"""Packed experts that are decoded a layer ahead: bits of dense ones, and the order of two streams."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fluxmoe.kernels.expert_table import DOWN, GATE_UP, ExpertTable
from fluxmoe.kernels.formats import DENSE, fitting
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.kernels.triton import tiles
from fluxmoe.kernels.triton.decoded_ahead import DecodedAhead
from fluxmoe.kernels.triton.experts import TritonExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = ExpertDims(128, 128, 3, 2, torch.bfloat16)
TOKENS = 5


def table_of(ops: TritonExperts, weights: list[tuple[torch.Tensor, torch.Tensor]], formats: list[str]) -> ExpertTable:
    pairs = []
    for (gate_up, down), name in zip(weights, formats, strict=True):
        blocks = tuple(torch.zeros(nbytes, dtype=torch.uint8) for nbytes in ops.expert_bytes(name))
        ops.encode_expert(gate_up, down, (blocks[0], blocks[1]), name)
        pairs.append((blocks[0].to(DEVICE), blocks[1].to(DEVICE)))
    return ExpertTable.from_blocks(pairs, DEVICE, formats)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["planar12", "planar8"])
def test_layers_that_are_decoded_ahead_have_the_bits_of_dense_ones(name, monkeypatch):
    """A pass given up after its first layer, a whole one, and a layer that its predecessor did not know; dense experts
    beside packed ones, and alone."""
    monkeypatch.setattr(tiles, "DECODE_ROWS", 0)
    ops = TritonExperts(DIMS, TOKENS, DEVICE, formats=(name,), decode_ahead=True)
    ahead = ops._ahead
    assert ahead is not None
    assert ops._decoded is None
    for buffer in ahead._buffers:
        buffer.fill_(0xFF)  # NaN
    formats = [[name] * 3, [DENSE, name, name], [DENSE] * 3]
    layers = []
    for each in formats:
        made = [[fitting(name, torch.randn(shape).bfloat16()) for shape in DIMS.shapes] for _ in range(DIMS.experts)]
        weights = [(gate_up, down) for gate_up, down in made]
        layers.append((table_of(ops, weights, each), table_of(ops, weights, [DENSE] * 3)))
    x, logits = torch.randn(TOKENS, 128).bfloat16().to(DEVICE), torch.randn(TOKENS, 3).to(DEVICE)

    def run(table: ExpertTable, following: ExpertTable | None) -> torch.Tensor:
        page: Any = SimpleNamespace(table=table, wait=lambda tensor_type: None, following=lambda: following)
        return ops.moe_add(x, ops.route(logits), page, torch.zeros_like(x))

    expected = [run(dense, None) for _, dense in layers]
    assert all(each.isfinite().all() for each in expected)
    for layer, after in ((0, 1), (0, 1), (1, 2), (2, None), (1, None)):
        out = run(layers[layer][0], None if after is None else layers[after][0])
        assert torch.equal(out, expected[layer]), (layer, after)


class Recorder:
    """Stands in for torch.cuda: logs what is enqueued on which stream, in the host's order."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.active, self.capturing, self.names = self._stream("compute"), False, iter(("aside",))

    def _stream(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_event=lambda event: self.log.append(("wait", name, event)))

    def Stream(self, priority: int = 0) -> Any:
        assert priority < 0, "else the compute stream's programs come first, and nothing runs beside them"
        return self._stream(next(self.names))

    def Event(self) -> Any:
        event = SimpleNamespace()
        event.record = lambda stream: self.log.append(("record", stream.name, event))
        return event

    def current_stream(self) -> Any:
        return self.active

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: Any):
        before, self.active = self.active, stream
        yield
        self.active = before


class Logged(DecodedAhead):
    def _launch(self, table: ExpertTable, tensor: int) -> None:
        self._cuda.log.append(("write", self._cuda.active.name, tensor, table))


def check_order(log: list[tuple]) -> None:
    """On vector clocks: the buffer that a product reads has its layer's experts, and every write and read of a buffer
    comes after all that came before it in the host's order and touches the same one."""
    clocks: dict[str, dict[str, int]] = {"compute": {}, "aside": {}}
    events: dict[int, dict[str, int]] = {}
    touched: dict[int, list[tuple[str, int]]] = {GATE_UP: [], DOWN: []}
    holds: dict[int, object] = {}
    for kind, stream, *what in log:
        clock = clocks[stream]
        if kind == "wait":
            for name, count in events.get(id(what[0]), {}).items():
                clock[name] = max(clock.get(name, 0), count)
        elif kind == "record":
            events[id(what[0])] = dict(clock)
        else:
            tensor, table = what
            clock[stream] = clock.get(stream, 0) + 1
            for other, count in touched[tensor]:
                assert clock.get(other, 0) >= count, f"{kind} of {tensor} on {stream} may come before work on {other}"
            touched[tensor].append((stream, clock[stream]))
            if kind == "write":
                holds[tensor] = table
            assert holds[tensor] is table, "a product reads another layer's experts"


def one_pass(ahead: Logged, tables: list[ExpertTable], cuda: Recorder, length: int) -> None:
    for layer in range(length):
        for tensor in (GATE_UP, DOWN):
            ahead.of(tables[layer], tensor)
            cuda.log.append(("read", "compute", tensor, tables[layer]))
            ahead.begin(tables[layer + 1] if layer + 1 < len(tables) else None, tensor)


def made(layers: int) -> tuple[Recorder, Logged, list[ExpertTable]]:
    cuda, blocks = Recorder(), [(torch.zeros(16, dtype=torch.uint8),) * 2] * 3
    tables = [ExpertTable.from_blocks(blocks, "cpu", "planar12") for _ in range(layers)]
    return cuda, Logged(DIMS, "cpu", cuda), tables


@pytest.mark.parametrize("given_up", [False, True], ids=["whole passes", "a pass given up"])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_what_is_decoded_aside_is_ordered_with_what_reads_it(layers, given_up):
    cuda, ahead, tables = made(layers)
    for length in (layers, (layers + 1) // 2 if given_up else layers, layers):
        one_pass(ahead, tables, cuda, length)
    check_order(cuda.log)
    writes = [entry[1] for entry in cuda.log if entry[0] == "write"]
    # All but the first layer of each pass.
    assert writes.count("compute") == 3 * 2
    assert writes.count("aside") >= 2 * 2 * (layers - 1)
    for dropped in ("compute", "aside") if layers > 1 else ():
        with pytest.raises(AssertionError, match="may come before"):
            check_order([entry for entry in cuda.log if entry[:2] != ("wait", dropped)])


def test_once_captured_nothing_is_decoded_beside_a_graph():
    cuda, ahead, tables = made(3)
    one_pass(ahead, tables, cuda, 2)  # given up
    begin = len(cuda.log)
    cuda.capturing = True
    one_pass(ahead, tables, cuda, 3)
    cuda.capturing = False
    one_pass(ahead, tables, cuda, 3)
    assert {entry[:2] for entry in cuda.log[begin:]} == {("write", "compute"), ("read", "compute")}
    check_order(cuda.log[begin:])
