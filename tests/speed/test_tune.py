"""The choice of attention kernels, with a fake clock, and with kernels that fail or compute wrongly."""

import json
import sys
import warnings

import pytest
import torch

from nanoip2p.attention import attention, attention_reference
from nanoip2p.speed import tune
from nanoip2p.speed.tune import BACKENDS, TILES, Tuner

HEADS, D, CARD = 2, 8, tune.card
FIRST, SECOND, THIRD = map(str, TILES["text"])


def inputs(rows=2, queries=24, keys=20, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, tokens, HEADS * D, generator=generator).to(dtype)
            for tokens in (queries, keys, keys)]


def right(q, k, v, heads, tile, map_from):
    return attention(q, k, v, heads, map_from=map_from)


class Bench:
    """Makes Tuners for a fake card. times: milliseconds of each kernel. timed: kernels that were timed."""

    def __init__(self, path):
        self.path, self.times, self.timed, self.lines, self.ran = path, {}, [], [], []

    def clock(self, run):
        run()
        self.timed.append(run.args[0])
        return self.times.get(run.args[0], 1.0)

    def tuner(self, ours=right, only_ours=False, verbose=False):
        def kernel(q, k, v, heads, tile, map_from):
            self.ran.append(str(tile))
            return ours(q, k, v, heads, tile, map_from)

        return Tuner(kernel, only_ours, self.lines.append, verbose)

    def call(self, tuner, *given, **more):
        """Calls the tuner twice and checks the results. Returns the kernel of the second call."""
        given = given or inputs()
        wanted = attention_reference(*(x.double() for x in given[:3]), HEADS, map_from=more.get("map_from"))
        for _ in range(2):
            self.ran.clear()
            out = tuner(*given, HEADS, **more)
            assert tune.error(out, wanted) < 3 * tune.BOUNDS[out.dtype]
        return self.ran[-1] if self.ran else "torch's"

    def written(self):
        return json.loads(self.path.read_text())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    bench = Bench(tmp_path / "caches" / "nanoip2p" / "attention.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(tune, "card", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # raises without CUDA
    monkeypatch.setattr(tune, "milliseconds", bench.clock)
    return bench


@pytest.mark.parametrize("ms, chosen", [(0.96, True), (0.98, False), (1.0, False), (5.0, False)])
def test_a_kernel_has_to_win_by_three_percent(bench, ms, chosen):
    bench.times[SECOND] = ms
    assert (bench.call(bench.tuner()) == SECOND) is chosen
    assert list(bench.written()["a card"].values()) == [SECOND if chosen else "default"]


def test_the_fastest_wins(bench):
    bench.times |= {FIRST: 0.9, SECOND: 0.7, THIRD: 0.8, "flash": 0.75}
    assert bench.call(bench.tuner()) == SECOND
    bench.times["flash"] = 0.5
    assert bench.call(bench.tuner(), *inputs(rows=3)) == "torch's"
    assert "flash" in bench.written()["a card"].values()


@pytest.mark.parametrize("noisy", ["default", SECOND])
def test_a_first_measurement_that_is_slow_decides_nothing(bench, noisy, monkeypatch):
    """Later rounds correct it. Here torch's choice takes 1.0 ms, and ours is 2% or 10% faster."""
    bench.times[SECOND] = 0.98 if noisy == "default" else 0.9
    seen = set()

    def clock(run):
        first = run.args[0] not in seen
        seen.add(run.args[0])
        return bench.clock(run) * (1.2 if first and run.args[0] == noisy else 1)

    monkeypatch.setattr(tune, "milliseconds", clock)
    assert bench.call(bench.tuner()) == ("torch's" if noisy == "default" else SECOND)


def damaged(out, damage):
    out = out.clone()
    if damage == "one number":
        out[-1, -1, -1] += 0.2
    elif damage == "NaN":
        out[0, 3, 2] = float("nan")
    elif damage == "scale":
        out *= 1.03
    elif damage == "rows":
        out = out.flip(0)
    elif damage == "heads":
        out = torch.cat([out[..., D:], out[..., :D]], dim=-1)
    elif damage == "not written":
        out[:, 16:] = 0
    return out


DAMAGES = ("one number", "NaN", "scale", "rows", "heads", "not written")


@pytest.mark.parametrize("only_ours", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_kernel_is_never_chosen(bench, damage, only_ours):
    bench.times |= dict.fromkeys((FIRST, SECOND, THIRD), 0.1)
    tuner = bench.tuner(lambda *given: damaged(right(*given), damage), only_ours, verbose=True)
    assert bench.call(tuner) == "torch's"
    assert sum("wrong by" in line for line in bench.lines) == 3
    assert not {FIRST, SECOND, THIRD} & {*bench.timed}
    tuner = bench.tuner(lambda *given: damaged(right(*given), damage * (str(given[4]) == FIRST)), only_ours)
    assert bench.call(tuner, *inputs(rows=3)) == SECOND


FAILURES = RuntimeError("no memory"), AssertionError(), KeyError("tl.dot"), OSError()


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_kernel_that_fails_is_never_chosen(bench, failure, recwarn):
    def fail(*_):
        warnings.warn("as torch explains why a backend does not run", stacklevel=1)
        raise failure

    bench.times |= dict.fromkeys((FIRST, SECOND, THIRD), 0.1)
    for only_ours in (False, True):
        assert bench.call(bench.tuner(fail, only_ours, verbose=True)) == "torch's"
    assert sum(type(failure).__name__ in line and FIRST in line for line in bench.lines) == 2
    assert not recwarn


@pytest.mark.parametrize("share, chosen", [(1.5, FIRST), (2.5, "torch's")])
def test_twice_the_error_of_torchs_own_kernel_is_rounding(bench, share, chosen, monkeypatch):
    """If scores are so large that the error of torch's own kernel exceeds BOUNDS."""
    monkeypatch.setattr(tune, "BOUNDS", {torch.bfloat16: 1e-6})
    given = inputs()
    wanted = tune.reference(*given, HEADS, None)
    plain = attention(*given, HEADS)
    bench.times[FIRST] = 0.5
    tuner = bench.tuner(lambda *_: wanted + share * (plain - wanted))
    tuner(*given, HEADS)
    bench.ran.clear()
    tuner(*given, HEADS)
    assert (bench.ran or ["torch's"]) == [chosen]


def test_a_second_process_neither_measures_nor_changes_the_choice(bench, monkeypatch):
    bench.times[SECOND] = 0.5
    assert bench.call(bench.tuner()) == SECOND and bench.timed
    bench.times |= {SECOND: 5.0, FIRST: 0.1}
    bench.timed.clear()
    monkeypatch.setattr(tune, "reference", None)
    assert bench.call(bench.tuner()) == SECOND and not bench.timed


def test_a_case_is_everything_that_a_kernel_may_depend_on(bench):
    """Each size, dtype, number of rows and kind of attention is measured separately."""
    maps = torch.tensor([1, 1], dtype=torch.int32)
    calls = [(inputs(), {}), (inputs(rows=3), {}), (inputs(queries=25), {}), (inputs(keys=21), {}),
             (inputs(dtype=torch.float16), {}), (inputs(), {"map_from": maps}),
             ([*inputs(rows=3)[:2], inputs()[2][:, :20]], {"map_from": maps})]
    tuner = bench.tuner()
    for number, (given, more) in enumerate(calls, 1):
        before = len(bench.timed)
        bench.call(tuner, *given, **more)
        assert len(bench.timed) > before and len(bench.written()["a card"]) == number
    q, k, v = inputs()
    tuner(*(x.repeat(1, 1, 2) for x in (q, k, v)), HEADS)       # wider heads
    tuner(*(x.repeat(1, 1, 2) for x in (q, k, v)), 2 * HEADS)
    assert len(bench.written()["a card"]) == len(calls) + 2


@pytest.mark.parametrize("changed", ["name", "driver", "torch", "triton", "nanoip2p"])
def test_another_card_or_version_measures_anew(bench, changed, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "card", CARD)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(tune, "DRIVER", tmp_path / "version")
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08  Build\nGCC version:  gcc 12.2.0\n"
    tune.DRIVER.write_text(text)
    CARD.cache_clear()
    bench.call(bench.tuner())
    bench.timed.clear()
    bench.call(bench.tuner())
    assert not bench.timed and "575.57.08" in next(iter(bench.written()))
    if changed == "name":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    elif changed == "driver":
        tune.DRIVER.write_text(text.replace("575.57.08", "580.65.06"))
    else:
        holder = tune if changed == "nanoip2p" else sys.modules[changed]
        monkeypatch.setattr(holder, "__version__", "99.0")
    CARD.cache_clear()
    bench.call(bench.tuner())
    assert bench.timed and len(bench.written()) == 2
    CARD.cache_clear()


CASE = "2 rows, 2 heads of 8, 24 x 20, torch.bfloat16"


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b"[" * 99999, b'{"a card": 3}', b'{"a card": ["default"]}',
    json.dumps({"a card": {CASE: 5}}).encode(), json.dumps({"a card": {CASE: [64, 32, 4, 2]}}).encode(),
    json.dumps({"a card": {CASE: "(64, 32, 4, 99)"}}).encode(),
    json.dumps({"a card": {CASE: "__import__('os')"}, "b": {}}).encode()])
def test_a_broken_file_is_ignored_and_replaced(bench, content):
    bench.path.parent.mkdir(parents=True)
    bench.path.write_bytes(content)
    bench.times[SECOND] = 0.5
    tuner = bench.tuner()
    assert len(bench.lines) == 1 and str(bench.path) in bench.lines[0] and "\n" not in bench.lines[0]
    assert bench.call(tuner) == SECOND and len(bench.lines) == 1
    assert bench.written() == {"a card": {CASE: SECOND}}
    assert {path.name for path in bench.path.parent.iterdir()} == {"attention.json", "attention.lock"}


def test_a_tile_that_we_would_not_try_here_is_measured_again(bench):
    """A tile of ours for other cases may not fit into the shared memory of this card."""
    bench.path.parent.mkdir(parents=True)
    bench.path.write_text(json.dumps({"a card": {CASE: str(TILES["long"][3])}}))
    assert bench.call(bench.tuner()) == "torch's" and bench.timed
    assert bench.written() == {"a card": {CASE: "default"}}


@pytest.mark.parametrize("obstacle", ["a folder", "a file in place of the folder"])
def test_without_a_place_for_the_file_everything_works(bench, obstacle):
    """It prints a line, and the choice holds for this process."""
    if obstacle == "a folder":
        bench.path.mkdir(parents=True)
    else:
        bench.path.parent.parent.mkdir()
        bench.path.parent.touch()
    bench.times[SECOND] = 0.5
    tuner = bench.tuner()
    assert bench.call(tuner) == SECOND and bench.call(tuner, *inputs(rows=3)) == SECOND
    assert len(bench.lines) == 2 and "measures attention again" in bench.lines[1]
    count = len(bench.timed)
    assert bench.call(tuner) == SECOND and len(bench.timed) == count


def test_processes_keep_what_the_others_write(bench):
    one, other = bench.tuner(), bench.tuner()
    bench.call(one)
    bench.call(other, *inputs(rows=3))
    bench.call(one, *inputs(rows=4))
    assert len(bench.written()["a card"]) == 3


def test_of_two_processes_that_measure_at_once_the_first_decides(bench):
    one, other = bench.tuner(), bench.tuner()
    bench.times[SECOND] = 0.5
    assert bench.call(one) == SECOND
    bench.times |= {SECOND: 5.0, FIRST: 0.5}
    assert bench.call(other) == SECOND and bench.call(bench.tuner()) == SECOND


@pytest.mark.parametrize("where", ["graph", "compiler"])
def test_nothing_is_measured_while_calls_are_recorded(bench, where, monkeypatch):
    owner, name = {"graph": (torch.cuda, "is_current_stream_capturing"),
                   "compiler": (torch.compiler, "is_compiling")}[where]
    bench.times[SECOND] = 0.5
    with monkeypatch.context() as recording:
        recording.setattr(owner, name, lambda: True)
        assert bench.call(bench.tuner()) == "torch's" and not bench.timed and not bench.path.exists()
    tuner = bench.tuner()
    assert bench.call(tuner) == SECOND
    monkeypatch.setattr(owner, name, lambda: True)
    assert bench.call(tuner) == SECOND


def test_ours_is_not_timed_and_leaves_no_file(bench):
    bench.times[SECOND] = 0.5
    assert bench.call(bench.tuner()) == SECOND
    before, count = bench.path.read_bytes(), len(bench.timed)
    assert bench.call(bench.tuner(only_ours=True)) == FIRST
    assert len(bench.timed) == count and bench.path.read_bytes() == before
    bench.ran.clear()
    tuner = bench.tuner(only_ours=True)
    given = [x.float() for x in inputs()]
    assert bench.call(tuner, *given) == str(TILES["fp32"][0])
    odd = [x[..., :10] for x in inputs()]  # heads of 5
    assert bench.call(tuner, *odd) == "torch's"


def test_in_single_precision_ours_is_not_tried(bench):
    bench.call(bench.tuner(), *(x.float() for x in inputs()))
    assert "default" in bench.timed and not set(bench.timed) - {"default", *BACKENDS}


def test_gradients_are_torchs(bench):
    bench.times[FIRST] = 0.1
    tuner, (q, k, v) = bench.tuner(), inputs()
    assert bench.call(tuner) == FIRST
    bench.ran.clear()
    tuner(q.requires_grad_(), k, v, HEADS).sum().backward()
    assert not bench.ran and q.grad.isfinite().all()
    with torch.no_grad():
        tuner(q, k, v, HEADS)
    assert bench.ran == [FIRST]


def test_numbers_that_are_not_finite_prove_nothing(bench):
    q, k, v = inputs()
    bench.times[FIRST] = 0.1
    tuner = bench.tuner()
    assert tuner(q * float("nan"), k, v, HEADS).isnan().any() and not bench.path.exists()
    assert bench.call(tuner) == FIRST
    q, k, v = inputs(rows=3)
    assert not bench.tuner()(q, k, 0 * v, HEADS).any() and len(bench.written()["a card"]) == 2


def test_verbose_says_each_decision_in_a_line(bench):
    bench.call(bench.tuner())
    assert not bench.lines
    bench.times |= {SECOND: 0.5}
    bench.call(bench.tuner(verbose=True), *inputs(rows=3))
    assert sum("not cudnn" in line or "not efficient" in line for line in bench.lines) == 2
    assert len(bench.lines) == 3 and f"{SECOND} of default 1.000 ms" in bench.lines[-1]
    assert all("3 rows" in line and "\n" not in line for line in bench.lines)


def test_all_cases_of_stable_diffusion_take_less_than_two_seconds(bench, monkeypatch):
    """At 512 pixels on a card of 25 TFLOP/s. The time in which Triton builds kernels is not counted."""
    spent, tried = [], []

    def clock(run):
        kernel, q, k, _, heads, _ = run.args
        tried.append(kernel)
        d, launch = q.shape[2] // heads, 0.02
        ms = max(launch, 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] / 25e9)
        ms *= 1 if kernel in ("default", *BACKENDS) or d == 40 else 1.5
        spent.append(3 * ms)
        return ms

    monkeypatch.setattr(tune, "milliseconds", clock)
    monkeypatch.setattr(tune, "reference", lambda *given: None)
    monkeypatch.setattr(tune, "error", lambda out, wanted: 0.0)
    tuner = bench.tuner()
    monkeypatch.setattr(tuner, "run", lambda *given: None, raising=False)
    for rows in (2, 3):  # 3 branches share 2 rows before the first cross-attention
        for queries, d in ((4096, 40), (1024, 80), (256, 160), (64, 160)):
            for keys in (queries, 77):
                half = {"dtype": torch.bfloat16, "device": "meta"}
                q, k = (torch.empty(rows, positions, 8 * d, **half) for positions in (queries, keys))
                tuner(q, k, k, 8)
    assert 100 < sum(spent) < 2000, sum(spent)
    assert len(bench.written()["a card"]) == 16
    first = {str(some[0]) for kind, some in TILES.items() if kind != "fp32"}  # others: only for d = 40
    everywhere = {str(tile) for tile in TILES["long"] + TILES["text"]}
    assert set(tried) - {"default", *BACKENDS} == first | everywhere


def test_the_reference_is_computed_in_parts(monkeypatch):
    sizes, real = [], attention_reference
    monkeypatch.setattr(tune, "attention_reference",
                        lambda q, *rest: (sizes.append(q.shape[1]), real(q, *rest))[1])
    q, k, v = inputs(rows=2, queries=1100, keys=4096)
    map_from = torch.tensor([1, 0, 1], dtype=torch.int32)
    v = torch.cat([v, v[:1] * 2])
    out = tune.reference(q, k, v, HEADS, map_from)
    assert len(sizes) > 1 and out.dtype == torch.float32
    assert torch.allclose(out, real(q.float(), k.float(), v.float(), HEADS, map_from=map_from), atol=1e-6)


def test_a_compiled_network_uses_the_choice_and_is_not_compiled_again(bench):
    """Nothing is measured while it compiles. A case that is measured later does not compile it anew."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    bench.times[SECOND] = 0.5
    tuner = Tuner(lambda *given: right(*given).neg().neg(), False, print)
    compiled = torch.compile(lambda *given: 1 + tuner(*given, HEADS), dynamic=False, fullgraph=True,
                             backend=compiler)
    first, other = inputs(), inputs(rows=3)
    compiled(*other)
    assert not bench.timed and len(graphs) == 1 and "neg" not in graphs[0].code
    tuner(*first, HEADS)
    count = len(bench.timed)
    assert torch.equal(compiled(*first), 1 + attention(*first, HEADS))
    assert len(graphs) == 2 and "neg" in graphs[1].code and len(bench.timed) == count
    tuner(*inputs(rows=4), HEADS)
    compiled(*first), compiled(*other)
    assert len(graphs) == 2 and len(bench.timed) > count
