"""``benchmarks/growth``: what it counts, and the model on paper against real steps."""

import math
import resource
import statistics

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.growth import constants, fresh, paper_model, point, processes, report, traffic
from benchmarks.growth.paper_model import Assumptions, Setting, largest
from benchmarks.growth.processes import OURS, PARALLEL, PLAIN, SHARDED
from benchmarks.growth.rows import Rows, times
from benchmarks.growth.wire import Message

SIZE, WIDTH = 1e4, 35  # 8 layers of 35 x 35 and the classes
NUMBERS = 8 * (WIDTH**2 + WIDTH) + 10 * WIDTH + 10


@pytest.fixture(scope="module")
def two():
    """Steps on two processes."""
    return {kind: processes.measured(SIZE, kind, 2, seconds=0.0) for kind in processes.KINDS}


def test_an_evaluation_is_one_message_of_three_v_and_u(two):
    """r, grad_v f, H q, u, two losses, who uses u, who failed, who takes differences.

    And one number at the end of the step: did the rules and their hooks raise anywhere?
    """
    row = two[PARALLEL]
    assert row["parameters"] == NUMBERS
    assert row[OURS]["messages"] == 2
    assert row[OURS]["payload"] == 4 * (3 * NUMBERS + row["upper"] + 2 + 1 + 2 + 1)
    assert row[PLAIN]["payload"] == 4 * NUMBERS


def test_shards_are_gathered_twice_and_scattered_once_for_each_gradient(two):
    row = two[SHARDED]
    # fully_shard pads nothing here but rows: 35 = 18 + 17.
    rows = 8 * (36 * WIDTH + 36) + 10 * WIDTH + 10
    assert row[PLAIN]["payload"] == 4 * 3 * rows
    rest = row[OURS]["payload"] - 3 * row[PLAIN]["payload"]
    u_and_numbers = 4 * (row["upper"] + 2 + 1 + 2)
    norms_of_tensors = 8 * 2 * 9 * 20  # at most 20 times the norms of 18 tensors, in float64
    assert u_and_numbers < rest < u_and_numbers + norms_of_tensors


@pytest.mark.parametrize("name", [OURS, PLAIN])
@pytest.mark.parametrize("kind", [PARALLEL, SHARDED])
def test_the_model_sends_what_a_step_sends(two, kind, name):
    """But u, 1,000 numbers here, which the model says it leaves out."""
    row = two[kind]
    told = Setting(name, NUMBERS, 2, kind, "float32").sent_with(probes=0)
    beside = 4 * row["upper"] if name == OURS else 0  # of a ring of two: once
    # Padded rows, 3 %, and numbers; a wrong count of vectors would be off by a third.
    assert row[name]["sent"] == pytest.approx(told + beside, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*have 16 bits")  # as here they are meant to have
@pytest.mark.parametrize(
    ("dtype", "own", "plain"),
    # v, its gradient, two moments; and nu in float32, and the probe's direction.
    [("float32", 4 + 4 + 8 + 4 + 4, 16), ("bfloat16", 2 + 2 + 4 + 4 + 2, 8)],
)
def test_the_model_holds_what_a_step_holds(dtype, own, plain):
    for name, state in ((OURS, own), (PLAIN, plain)):
        kept, found = constants.read()[dtype][name], constants.of(name, dtype, constants.SIZE)
        assert found["state"] == pytest.approx(state, rel=2e-3)  # u is 1,000 numbers of 1e6
        assert kept["state"] == pytest.approx(found["state"], rel=2e-3)
        n = processes.LAYERS * 355**2
        cell = Setting(name, n, 1, dtype=dtype)
        # Counts, not times: what differs is that the page was not written again.
        assert cell.vectors() == pytest.approx(found["peak"] * n, rel=0.02)
        assert kept["vector"] == pytest.approx(found["vector"], rel=0.02)
        assert kept["gradients, mean"] == found["gradients, mean"]


def test_gradients_of_a_step():
    """Three of finite differences and a probe in every 20th; central ones of 16 bits take four."""
    found = {d: constants.read()[d][OURS]["gradients, mean"] for d in constants.DTYPES}
    assert found == {"float32": 3 + 1 / 20, "bfloat16": 4 + 2 / 20}


def test_vector_work_is_what_operations_read_and_write():
    a, b = torch.ones(1000, dtype=torch.float32), torch.ones(1000, dtype=torch.float32)

    def bytes_of(what):
        return traffic.moved(what).total()

    assert bytes_of(lambda: a + b) == 12_000
    assert bytes_of(lambda: a.add_(b)) == 12_000
    assert bytes_of(lambda: torch._foreach_add_([a], [b])) == 12_000
    assert bytes_of(lambda: torch._foreach_copy_([a], [b])) == 8_000
    assert bytes_of(lambda: a.copy_(b)) == 8_000
    assert bytes_of(lambda: torch.zeros_like(a)) == 4_000
    assert bytes_of(lambda: a.view(10, 100).t()) == 0
    assert bytes_of(lambda: a.view(10, 100) @ b.view(100, 10)) == 0


def test_rings():
    """Reduce and gather, each of W - 1 sends of a W-th part."""
    assert Message("all-reduce", 100).sent(4) == 2 * 3 * 25
    assert Message("all-gather", 100).sent(4) == Message("reduce-scatter", 100).sent(4) == 3 * 25
    assert Message("all-reduce", 100).sent(1) == 0


def test_a_cell_of_the_model_by_hand():
    """1e9 parameters on 16 GPUs in two nodes, data parallel, ours."""
    own = constants.read()["bfloat16"][OURS]
    cell = Setting(OURS, 1e9, 16, PARALLEL, assumed=Assumptions(tokens=1000))
    gradients = own["gradients, mean"] * 8 * 1e9 * 1000 / (0.4 * 989e12)
    vectors = own["vector"] * 1e9 / (0.8 * 3.35e12)
    sent = 2 * 15 / 16 * (3 + 1 / 20) * 4 * 1e9
    assert cell.sent == pytest.approx(sent)
    assert cell.seconds == pytest.approx(gradients + vectors + sent / (0.8 * 50e9))
    inside = Setting(OURS, 1e9, 8, PARALLEL)
    assert inside.wire_seconds == pytest.approx(inside.sent / (0.8 * 450e9))


def test_plain_training_hides_what_it_sends():
    cell = Setting(PLAIN, 1e9, 8, PARALLEL)
    assert 0 < cell.wire_seconds < 0.75 * cell.gradient_seconds
    assert cell.parts["wire"] == 0
    few = Setting(PLAIN, 1e9, 64, PARALLEL, assumed=Assumptions(tokens=10))
    assert few.parts["wire"] == pytest.approx(few.wire_seconds - 0.75 * few.gradient_seconds)


def test_the_largest_fits_and_a_little_more_does_not():
    most = largest(OURS, 64, SHARDED)
    assert Setting(OURS, most, 64).fits
    assert not Setting(OURS, 1.05 * most, 64).fits
    assert paper_model.limits([64]).count(f"{most:.2g}") >= 1


def rows_with(path, power):
    """Times that grow by a power, in seconds, without measuring."""
    rows = Rows(path)
    for size in (1e4, 1e5, 1e6):
        for curve in point.ENGINES:
            cpu = {"cpu": size**power, "system": 0.0, "faults": 0}
            about = {"part": "parameters", "size": size, "curve": curve, "allocator": point.KEPT}
            about |= {"parameters": size, "evaluations": 3.0, curve: cpu}
            plain = {point.PLAIN: cpu | {"cpu": size}}
            ratios = {name: [1.0, 2.0, 3.0] for name in (point.PLAIN, point.GRADIENT)}
            rows.once(f"{size}, {curve}", lambda r=ratios: {"ratios": r}, **about, **plain)
    return rows


def test_slopes_are_judged(tmp_path):
    end = "1e+05 to 1e+06 | 1.1 |"
    table = report.slopes(rows_with(tmp_path / "steep.jsonl", 1.2))
    assert f"| finite differences | kept | 1.20 | 1.20 | {end} **missed** |" in table
    assert "| plain training | kept | 1.00 | 1.00 |" in table
    table = report.slopes(rows_with(tmp_path / "flat.jsonl", 1.05))
    assert f"| finite differences | kept | 1.05 | 1.05 | {end} kept |" in table


def test_what_was_measured_is_not_measured_again(tmp_path):
    before = rows_with(tmp_path / "rows.jsonl", 1.0)
    again = Rows(tmp_path / "rows.jsonl")
    assert again.found == before.found
    key = next(iter(before.found))
    assert again.once(key, lambda: 1 / 0) == before.found[key]
    assert [*times(again, point.PLAIN, point.KEPT)] == [1e4, 1e5, 1e6]


def faults_of_large_vectors():
    """Page faults of making and freeing 64 MB, after two that find room: the median of five.

    Not the sum: a system that reclaims idle pages takes them from one now and then.
    """
    seen = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16_000_000)
        seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {"faults": statistics.median(seen[2:])}


def test_the_allocator_keeps_what_it_has_where_asked():
    asked = point.in_fresh_process(faults_of_large_vectors, point.KEPT)["faults"]
    not_asked = point.in_fresh_process(faults_of_large_vectors, point.AS_IT_COMES)["faults"]
    pages = 64e6 / resource.getpagesize()
    assert asked < 0.1 * pages
    assert not_asked > 0.75 * pages


def fails():
    raise ValueError("on purpose")


def waits():
    while True:
        math.sqrt(2)


def test_one_that_fails_ends_those_that_wait_for_it():
    with pytest.raises(RuntimeError, match="ValueError: on purpose"):
        fresh.run([waits, fails])
