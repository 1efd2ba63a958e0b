"""Make ftcore/datasets/tiny and tiny_encoder: tokenizer and config.json of model=tiny, a random 2-layer Llama, and of
model=tiny_encoder, a random 4-layer ModernBERT. `make tiny`."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, ModernBertConfig, PreTrainedTokenizerFast

DATASETS = Path(__file__).parent.parent / "ftcore" / "datasets"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|mask|>"]


def texts():
    """Every passage and question of the shipped rows."""
    for file in sorted(DATASETS.glob("*/*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            yield from (row[key] for key in ("text", "prompt", "completion", "passage") if key in row)


if __name__ == "__main__":
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=512)
    fast.chat_template = (DATASETS / "chatml.jinja").read_text()
    fast.save_pretrained(DATASETS / "tiny")
    LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=2, pad_token_id=3, bos_token_id=None,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(DATASETS / "tiny")  # fmt: skip
    fast.save_pretrained(DATASETS / "tiny_encoder")
    ModernBertConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, local_attention=64, global_attn_every_n_layers=2, eos_token_id=2, pad_token_id=3,
        bos_token_id=None, cls_token_id=2, sep_token_id=2, architectures=["ModernBertForMaskedLM"],
    ).save_pretrained(DATASETS / "tiny_encoder")  # fmt: skip
