"""Writing a network for runtimes: ONNX, OpenVINO, ExecuTorch, and torch's own format."""

from lightning_compress.export.result import Exported, ExportError
from lightning_compress.export.targets import export

__all__ = ["ExportError", "Exported", "export"]
