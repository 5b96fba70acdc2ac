import time

import pytest
import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.evaluation import latency
from lightning_compress.evaluation.latency import measure_latency


def busy(seconds):
    def run(*_):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return run


def test_times_are_in_milliseconds_and_in_order():
    times = measure_latency({"a": busy(0.002), "b": busy(0.006)}, torch.zeros(3, 2), warmup=1, repeats=7)
    assert 2 <= times["a"].p10 <= times["a"].median <= times["a"].p90
    assert times["b"].median >= 6
    assert times["a"].median < times["b"].median
    assert (times["a"].batch_size, times["a"].threads, times["a"].backend, times["a"].repeats) == (3, 1, "eager", 7)


def test_modes_threads_and_randomness_are_given_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()
    statistics, threads = model[1].running_mean.clone(), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    try:
        measure_latency({"net": model, "random": lambda x: torch.rand(3)}, torch.zeros(2, 4), warmup=1, repeats=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [part.training for part in model] == [True, False, True]
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)


def test_compiled_modules_run_eagerly_unless_told_otherwise():
    built = []

    def backend(graph, example_inputs):
        built.append(graph)
        return graph.forward

    model = torch.compile(nn.Linear(3, 3), backend=backend)
    measure_latency({"net": model}, torch.zeros(1, 3), warmup=1, repeats=5)
    assert built == []
    times = measure_latency({"net": model}, torch.zeros(1, 3), warmup=1, repeats=5, backend="own")
    assert len(built) == 1
    assert times["net"].backend == "own"


def test_modes_are_given_back_after_an_error():
    model, threads = nn.Linear(3, 3), torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency({"net": model}, torch.zeros(1, 2))
    assert model.training
    assert torch.get_num_threads() == threads


def test_a_slow_candidate_gets_fewer_repeats_but_at_least_five():
    times = measure_latency({"slow": lambda x: time.sleep(0.02)}, torch.zeros(1), warmup=8, repeats=30, budget=0.05)
    assert times["slow"].repeats == 5


def test_waiting_for_others_is_seen_as_noise():
    times = measure_latency({"busy": busy(0.002), "waiting": lambda x: time.sleep(0.002)}, None, warmup=1, repeats=5)
    assert times["waiting"].noisy
    assert times["busy"].batch_size is None


def test_noise_is_wall_over_cpu_time_on_one_thread_and_spread_otherwise():
    def flag(times, threads=1, device="cpu"):
        return latency._summarize(times, 1, threads, "eager", device).noisy

    assert not flag([(1.19, 1.0)] * 5)
    assert flag([(1.21, 1.0)] * 5)
    assert not flag([(5.0, 1.0)] * 5, threads=2)
    assert flag([(1.0, 1.0), (3.0, 1.0)] * 5, device="cuda")


def test_quantiles_by_hand():
    summary = latency._summarize([(0.001 * value, 1.0) for value in range(1, 12)], 1, 1, "eager", "cpu")
    assert (summary.p10, summary.median, summary.p90) == pytest.approx((2.0, 6.0, 10.0))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"repeats": 4}, "`repeats`: expected at least 5"), ({"warmup": 0}, "`warmup`"), ({"threads": 0}, "`threads`")],
)
def test_bad_numbers(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        measure_latency({"net": nn.Identity()}, torch.zeros(1), **arguments)


def test_no_candidates():
    with pytest.raises(ConfigurationError, match="`candidates`"):
        measure_latency({}, torch.zeros(1))
