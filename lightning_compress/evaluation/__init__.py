"""What compression cost and gained: parameters, bytes, MACs, latency, metrics, and the report that shows them."""

from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.evaluation.flips import prediction_flip_rate
from lightning_compress.evaluation.latency import measure_latency
from lightning_compress.evaluation.measurement import Measurement, measure
from lightning_compress.evaluation.render import print_report, render_html, render_markdown, write_report
from lightning_compress.evaluation.report import assemble_report, build_report
from lightning_compress.evaluation.schema import validate_report
from lightning_compress.evaluation.size import dense_bytes, gzip_bytes

__all__ = [
    "Measurement",
    "assemble_report",
    "build_report",
    "count_macs",
    "count_parameters",
    "dense_bytes",
    "gzip_bytes",
    "measure",
    "measure_latency",
    "prediction_flip_rate",
    "print_report",
    "render_html",
    "render_markdown",
    "validate_report",
    "write_report",
]
