"""The rows that base and tuned model are scored on."""

from ftcore.data import Data, Records
from ftcore.data.sources import Row, rows_of
from ftcore.errors import ConfigError, DataError
from ftcore.methods.base import HeldOut, Method
from ftcore.methods.cloze import read_cloze
from ftcore.settings import Config


def load_held_out(config: Config, data: Data, method: Method, records: Records) -> HeldOut:
    """The held-out rows, cloze sentences and the general-text probe. Raises `ConfigError` for answers longer than any may be."""
    longest, room = config["evaluate"]["max_new_tokens"], method.encoder.tokenizer.model_max_length
    if longest >= room and method.network.can_generate():
        raise ConfigError(f"evaluate.max_new_tokens={longest:,}: the model has room for {room:,}, question and answer.")
    rows = records.test[: config["evaluate"]["max_rows"]]
    cloze = read_cloze(data.cloze) if data.cloze else []
    probe = general_texts(config["evaluate"]["probe"]) if config["evaluate"]["probe"] else []
    return HeldOut(rows, method.encode(rows), cloze, method.encode_text(probe) if method.predicts_tokens else [])


def general_texts(path: str) -> list[Row]:
    """Rows of general text with their ids. Raises `DataError` for a row without a text."""
    rows = list(rows_of(path))
    if missing := [where for where, row in rows if not isinstance(row.get("text"), str)]:
        raise DataError(f"{missing[0]}: general text needs a column 'text'.")
    return [{"id": str(row.get("id", where)), "text": row["text"]} for where, row in rows]
