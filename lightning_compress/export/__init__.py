"""Writing a network for runtimes: ONNX, OpenVINO, ExecuTorch, and torch's own format."""

from lightning_compress.export.export import export
from lightning_compress.export.result import Exported, ExportError

__all__ = ["ExportError", "Exported", "export"]
