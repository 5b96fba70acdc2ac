"""Each sentence under its condition, and not beside it."""

import pytest

from lightning_compress.evaluation import notes
from lightning_compress.evaluation.latency import Latency
from lightning_compress.evaluation.measurement import Measurement

FIGURES = {"parameters": 1000, "nonzero_parameters": 1000, "macs": 5000, "dense_bytes": 4100, "gzip_bytes": 3900}


def report(before=None, after=None, **top):
    compressed = {**FIGURES, "artifact_bytes": 800, "encoded_bits": None, **(after or {})}
    return {
        "baseline": {**FIGURES, **(before or {})},
        "compressed": compressed,
        "history": [],
        "layers": [],
        "speedup_rate": None,
        **top,
    }


def time(median, p10=None, p90=None, noisy=False):
    return Latency(median, p10 or median, p90 or median, 1, 1, "eager", noisy, 30)


def test_zeros_with_unchanged_shapes():
    text = notes.zeros_keep_shapes(report(after={"nonzero_parameters": 200}))
    assert text.startswith("80.0% of all parameters are zero, but every layer keeps its shape")
    layers = [{"parameters": [900, 900], "nonzero": [900, 100]}, {"parameters": [100, 100], "nonzero": [100, None]}]
    history = [{"sparsity": 0.5}, {"sparsity": 0.9}, {"loss": 1.0}]
    selected = report(after={"nonzero_parameters": 200}, history=history, layers=layers)
    assert notes.zeros_keep_shapes(selected).startswith(
        "90.0% of the selected weights (80.0% of all parameters) are zero"
    )


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 100), (0.9, 880)])
def test_no_word_on_selected_weights_where_zeros_came_after_fit_or_grew_back(sparsity, kept):
    layers = [{"parameters": [900, 900], "nonzero": [900, kept]}]
    stale = report(after={"nonzero_parameters": kept + 100}, history=[{"sparsity": sparsity}], layers=layers)
    assert notes.zeros_keep_shapes(stale).startswith(f"{1 - (kept + 100) / 1000:.1%} of all parameters are zero")


@pytest.mark.parametrize(
    "after",
    [
        {"nonzero_parameters": 995},
        {"nonzero_parameters": None},
        {"nonzero_parameters": 200, "parameters": 500},
        {"nonzero_parameters": 200, "macs": 2500},
    ],
)
def test_no_word_on_zeros_without_them_or_with_other_shapes(after):
    assert notes.zeros_keep_shapes(report(after=after)) == ""


def test_zeros_that_were_there_before_are_not_news():
    assert notes.zeros_keep_shapes(report({"nonzero_parameters": 200}, {"nonzero_parameters": 200})) == ""


def test_zeros_without_a_baseline():
    nothing = dict.fromkeys(FIGURES)
    assert "80.0%" in notes.zeros_keep_shapes(report(nothing, {"nonzero_parameters": 200}))
    assert notes.zeros_keep_shapes(report(nothing)) == ""


def test_only_the_file_is_small():
    text = notes.file_is_packed(report())
    assert "The file takes 800 bytes" in text
    assert "takes 4,100 bytes of memory again" in text
    assert "marks where" not in text
    bits = {"values": 4000, "indices": 1600, "codebooks": 0, "other": 800}
    assert "25% of it marks where they belong" in notes.file_is_packed(report(after={"encoded_bits": bits}))
    assert notes.file_is_packed(report(after={"artifact_bytes": 4000})) == ""
    assert notes.file_is_packed(report(after={"artifact_bytes": None})) == ""


def test_the_file_is_not_smaller():
    assert notes.file_is_not_smaller(report()) == ""
    assert notes.file_is_not_smaller(report(after={"artifact_bytes": None})) == ""
    dense = notes.file_is_not_smaller(report(after={"artifact_bytes": 4200}))
    assert "(4,200 against 4,100 bytes): 100.0% of the parameters are not zero" in dense
    bits = {"values": 800, "indices": 0, "codebooks": 0, "other": 30_000}
    small = {"artifact_bytes": 4200, "nonzero_parameters": 10, "encoded_bits": bits}
    assert "overhead make up 89% of it" in notes.file_is_not_smaller(report(after=small))
    assert notes.file_is_not_smaller(report(after={"artifact_bytes": 4200, "nonzero_parameters": 10})).endswith(
        "bytes)."
    )


def test_against_gzip():
    assert "20% smaller" in notes.against_gzip(report(after={"gzip_bytes": 1000}))
    assert "60% larger" in notes.against_gzip(report(after={"gzip_bytes": 500}))
    assert "same size" in notes.against_gzip(report(after={"gzip_bytes": 801}))
    assert notes.against_gzip(report(after={"gzip_bytes": None})) == ""
    assert notes.against_gzip(report(after={"artifact_bytes": None})) == ""


def test_fewer_macs_in_the_same_time():
    assert "MACs fell by 50%" in notes.fewer_macs_same_time(report(after={"macs": 2500}, speedup_rate=1.02))
    assert notes.fewer_macs_same_time(report(after={"macs": 2500}, speedup_rate=1.5)) == ""
    assert notes.fewer_macs_same_time(report(after={"macs": 4900}, speedup_rate=1.0)) == ""
    assert notes.fewer_macs_same_time(report(after={"macs": 2500})) == ""
    assert notes.fewer_macs_same_time(report(after={"macs": None}, speedup_rate=1.0)) == ""


def test_overlapping_latencies_show_no_difference():
    text = notes.within_noise(time(2.0, 1.5, 2.5), time(1.6, 1.4, 1.8))
    assert "1.5 to 2.5 ms before, 1.4 to 1.8 ms after" in text
    assert "rate of 1.25 shows no difference" in text
    assert notes.within_noise(time(2.0, 1.9, 2.1), time(1.0, 0.9, 1.1)) == ""
    assert notes.within_noise(None, time(1.0)) == ""


def test_a_slower_model_is_called_slower():
    assert "slower" in notes.slower(time(1.0, 0.9, 1.1), time(2.0, 1.9, 2.1))
    assert notes.slower(time(1.0, 0.9, 1.95), time(2.0, 1.9, 2.1)) == ""
    assert notes.slower(time(2.0, 1.9, 2.1), time(1.0, 0.9, 1.1)) == ""
    assert notes.slower(None, None) == ""


def test_noise():
    assert "compressed model was disturbed" in notes.disturbed("compressed", Measurement(latency=time(1.0, noisy=True)))
    assert notes.disturbed("compressed", Measurement(latency=time(1.0))) == ""
    assert notes.disturbed("compressed", Measurement()) == ""


def test_unknown_figures_with_one_reason_share_a_sentence():
    part = Measurement(reasons={"macs": "no inputs", "latency": "no inputs", "gzip_bytes": "switched off"})
    other = Measurement(reasons={"macs": "no inputs", "latency": "no inputs", "metrics": "no test_step"})
    found = [note for note in notes.explain(report(), part, other) if "unknown" in note]
    assert found == [
        "The MACs and latency of the baseline and the compressed model are unknown: no inputs.",
        "The gzip size of the baseline is unknown: switched off.",
        "The metrics of the compressed model are unknown: no test_step.",
    ]


def test_all_notes_of_a_report():
    found = notes.explain(report(after={"nonzero_parameters": 200}), None, Measurement(), "outputs are no tensors")
    assert [text.split()[0] for text in found] == ["80.0%", "The", "The", "Nothing", "The"]
    assert found[-1] == "The prediction flip rate is unknown: outputs are no tensors."
