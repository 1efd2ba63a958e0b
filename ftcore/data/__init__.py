"""Files to batches, one step a file: sources -> records -> tokens -> batches."""

from ftcore.data.records import Data, Records

__all__ = ["Data", "Records"]
