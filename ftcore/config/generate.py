"""Write the files that are generated from signatures and conf/: `python -m ftcore.config.generate`, or `make schema`."""

import json

from ftcore.config import editor_schema, reference, schema
from ftcore.files import PACKAGE


def generate() -> None:
    """Write schema.json, recipe.schema.json for editors and, in a checkout, docs/reference.md."""
    content = schema.build()
    (PACKAGE / "schema.json").write_text(content)
    editor_schema.FILE.write_text(editor_schema.build(json.loads(content)))
    if reference.FILE.parent.is_dir():
        reference.FILE.write_text(reference.build(json.loads(content)))


if __name__ == "__main__":
    generate()
