"""The text of --help, read from the shipped conf/."""

from ftcore.cli.verbs import VERBS
from ftcore.config.options import options
from ftcore.config.yaml_source import choices, read
from ftcore.console import plain
from ftcore.files import resources
from ftcore.settings import GROUPS

EXAMPLES = (
    ("method.lr=5e-4", "learning rate"),
    ("max_epochs=3", "passes over the training rows"),
    ("max_steps=100", "stop after so many optimizer steps"),
    ("global_batch_size=32", "rows per optimizer step"),
    ("micro_batch_size=2", "rows in memory at once (same result, less memory)"),
    ("data=jsonl data.path=my.jsonl", "your own rows"),
    ("data.columns.prompt=question", "which of your columns is the prompt"),
    ("model.path=<folder, run or hub name>", "other weights"),
    ("-m seed=1,2,3 method=sft,dpo", "every combination, a process each; sweeps=<name> is one from a file"),
    ("logger=none", "no Weights & Biases"),
    ("dry_run=true", "check everything, train nothing"),
)


def print_help() -> None:
    """Verbs, groups with their options and common overrides."""
    plain.print("Fine-tune a language model and see whether it got better.\n")
    plain.print("    python -m ftcore [verb] [group=option ...] [key=value ...]\n\nVerbs:")
    for verb in VERBS.values():
        plain.print(f"    {verb.usage:<27}{verb.meaning}")
    plain.print("\nGroups and their options (the default first):")
    defaults = {group: option for group, option, _ in choices(read(resources() / "conf" / "config.yaml").entries)}
    for group in GROUPS:
        names = sorted(options(group), key=lambda name: name != defaults.get(group))
        plain.print(f"    {group:<12}{', '.join(names)}")
    plain.print("\nCommon overrides:")
    for words, meaning in EXAMPLES:
        plain.print(f"    {words:<40}{meaning}")
    plain.print(
        f"\nEvery key with its meaning: {resources() / 'conf'}. The composed config: python -m ftcore --cfg job."
    )
