"""What comes out: the Hugging Face model, the report, the checkpoint."""

from .emit_model import EmitModelPass
from .make_report import MakeReportPass
from .save_checkpoint import SaveCheckpointPass

__all__ = ["EmitModelPass", "MakeReportPass", "SaveCheckpointPass"]
