"""From files to batches: formats -> sources -> records -> tokens -> layouts and steps, one file each."""

from ftcore.data.records import Data, Records

__all__ = ["Data", "Records"]
