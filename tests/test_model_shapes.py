"""`shape` of a shipped model option describes the published network: it has as many parameters."""

import pytest
import torch
import transformers

from ftcore.config.options import options
from ftcore.config.yaml_source import read
from ftcore.files import resources

# Parameters, a shared embedding counted once. Of gemma3, gpt2, llama3_8b and qwen3: `params` of the presets in
# https://github.com/keras-team/keras-hub/tree/master/keras_hub/src/models (Llama 3.1 has the shapes of Llama 3). Of the
# others: `safetensors.total` of the hub, https://huggingface.co/api/models/HuggingFaceTB/SmolLM2-135M-Instruct for one.
PUBLISHED = {
    "gemma3_1b": 999_885_952,
    "gpt2": 124_439_808,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "modernbert_base": 149_655_232,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
}
FILES = {option: read(resources() / f"conf/model/{option}.yaml") for option in options("model")}


def test_every_option_is_described_without_a_network():
    own = {option for option, file in FILES.items() if str(file.value("path")).startswith("ftcore://")}
    assert {option for option, file in FILES.items() if file.value("shape")} == PUBLISHED.keys() == FILES.keys() - own


@pytest.mark.parametrize("option", PUBLISHED)
def test_the_network_of_a_shape_has_the_published_number_of_parameters(option):
    shape = FILES[option].value("shape")
    config = transformers.AutoConfig.for_model(**shape)
    head = "MaskedLM" if config.model_type == "modernbert" else "CausalLM"
    with torch.device("meta"):
        network = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    assert network.num_parameters() == PUBLISHED[option]
    assert network.dtype == getattr(torch, shape["dtype"])
