"""The verbs and where they are."""

# Where the verbs are: those that get a checked config, and those that get the words of the command line and --config-dir.
ON_CONFIG = {
    "eval": "ftcore.verbs.finished:evaluate", "compare": "ftcore.verbs.finished:compare", "chat": "ftcore.verbs.finished:chat",
    "export": "ftcore.verbs.finished:export", "inspect": "ftcore.verbs.finished:inspect_data", "pack": "ftcore.sharing.pack:pack",
}  # fmt: skip


ON_WORDS = {
    "check": "ftcore.sharing.check:check", "replay": "ftcore.sharing.replay:replay", "explain": "ftcore.verbs.explain:explain",
    "storage": "ftcore.verbs.storage:storage", "wandb_sweep": "ftcore.sweeps.wandb:wandb_sweep",
}  # fmt: skip


VERBS = ("train", *ON_CONFIG, *ON_WORDS)
