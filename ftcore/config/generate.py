"""Write the files that are generated from signatures and conf/: `python -m ftcore.config.generate`, or `make schema`."""

import json

from ftcore.config import editor_schema, reference, schema
from ftcore.files import PACKAGE


def generate() -> None:
    """Write schema.json, recipe.schema.json for editors and, in a checkout, docs/reference.md."""
    content = schema.build()
    (PACKAGE / "schema.json").write_text(content)
    for module in (editor_schema, reference):
        if module.FILE.parent.is_dir():
            module.FILE.write_text(module.build(json.loads(content)))


if __name__ == "__main__":
    generate()
