"""Tiny random models of every family we promise, with tokenizers trained on a few sentences.

`make(name, folder)` writes one as transformers would and answers the folder. The same name always gives the same bits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

NAMES = ("qwen3", "llama", "gemma3", "mistral", "gpt2", "bert", "roberta", "t5")
"""Every tiny model."""
CAUSAL = ("qwen3", "llama", "gemma3", "mistral", "gpt2")
"""Decoders."""
CHAT = ("qwen3", "llama", "gemma3", "mistral")
"""Decoders with a chat template (ChatML)."""
ENCODERS = ("bert", "roberta")
"""Encoders, saved with the head they were pretrained with."""
SEQ2SEQ = ("t5",)
"""Encoder-decoders."""
CONTEXT = 512
"""Longest input of every tiny model, in tokens."""

SENTENCES = (
    "The parcel has not arrived yet, and the tracking page shows nothing new.",
    "I was charged twice for the same order; please refund one of the payments.",
    "My card was declined although there is enough money on the account.",
    "How do I change the address of my next delivery before it leaves?",
    "Reply with one JSON object: intent, team and urgency.",
    '{"intent": "refund", "team": "billing", "urgency": "high"}',
    "In 2026 there were 1234567890 orders, 365 days and 24 hours.",
    "The cat sat on the mat and the dog lay on the rug near the door.",
    "You are a helpful assistant. user assistant system",
    "我的包裹还没有到,物流页面没有更新。",
    "同一个订单被扣了两次款,请退还其中一笔。",
    "请用一个 JSON 对象回答:意图、团队和紧急程度。",
    "今天天气很好,我们去公园散步。",
)
"""What the tokenizers are trained on."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The plainest ChatML template: no silent system turn."""


def make(name: str, folder: Path) -> Path:
    """Write the tiny model `name` to `folder`: weights in safetensors, tokenizer, chat template where it has one."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(name)
    state = torch.random.get_rng_state()
    torch.manual_seed(20260 + NAMES.index(name))
    model = _build(name, tokenizer)
    torch.random.set_rng_state(state)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(folder: Path, to: Path | None = None) -> None:
    """A network that knows nothing has nothing to lose: let it learn which letters are common in general text."""
    import torch

    from metier import evaluation, models
    from metier.recipe import ModelSection

    model = models.load(ModelSection(base=str(folder)), head="causal")
    texts = [item.keys["text"] for item in evaluation.general_items("choosing", ["en"])]
    ids = torch.stack([model.tokenizer(text, return_tensors="pt").input_ids[0, :96] for text in texts])
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    models.save(model, to or folder)


def _build(name: str, tokenizer: Any) -> Any:
    import transformers as t

    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **ids,
    }
    encoder = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
    }
    match name:
        case "qwen3":
            return t.Qwen3ForCausalLM(t.Qwen3Config(**decoder, head_dim=8, tie_word_embeddings=True))
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**decoder, tie_word_embeddings=False))
        case "gemma3":
            return t.Gemma3ForCausalLM(
                t.Gemma3TextConfig(
                    **{**decoder, "num_hidden_layers": 3},
                    head_dim=8,
                    query_pre_attn_scalar=8,
                    sliding_window=64,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                )
            )
        case "mistral":
            return t.MistralForCausalLM(t.MistralConfig(**decoder, head_dim=8, sliding_window=None))
        case "gpt2":
            return t.GPT2LMHeadModel(
                t.GPT2Config(
                    vocab_size=len(tokenizer),
                    n_embd=32,
                    n_layer=2,
                    n_head=4,
                    n_positions=CONTEXT,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
        case "bert":
            return t.BertForMaskedLM(t.BertConfig(**encoder, max_position_embeddings=CONTEXT))
        case "roberta":
            # RoBERTa counts positions from pad_token_id + 1.
            return t.RobertaForMaskedLM(
                t.RobertaConfig(
                    **encoder,
                    max_position_embeddings=CONTEXT + 2,
                    type_vocab_size=1,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
        case "t5":
            return t.T5ForConditionalGeneration(
                t.T5Config(
                    vocab_size=len(tokenizer),
                    d_model=32,
                    d_kv=8,
                    d_ff=64,
                    num_layers=2,
                    num_heads=4,
                    n_positions=CONTEXT,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    decoder_start_token_id=tokenizer.pad_token_id,
                )
            )
    raise ValueError(f"no tiny model is called {name!r}; there are {', '.join(NAMES)}")


def _tokenizer(name: str) -> Any:
    match name:
        case "bert":
            return _word_piece()
        case "roberta":
            return _byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s>", "</s>", "<pad>", pair="roberta")
        case "t5":
            return _byte_pairs(["<pad>", "</s>", "<unk>"], None, "</s>", "<pad>", pair="end")
        case "gpt2":
            return _byte_pairs(["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", None)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_pairs(special, None, "<|im_end|>", "<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def _byte_pairs(special: list[str], bos: str | None, eos: str, pad: str | None, pair: str | None = None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    if pair == "roberta":
        core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    elif pair == "end":
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
        )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    if "<mask>" in special:
        named |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=CONTEXT,
        **{key: token for key, token in named.items() if token is not None},
    )


def _word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The library's own WordPiece trainer answers differently each time, so the vocabulary is listed here.
    words = sorted({word for text in SENTENCES for word in re.findall(r"[a-z]+", text.lower())})
    letters = sorted({letter for text in SENTENCES for letter in text.lower() if not letter.isspace()})
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in words if len(w) > 1)]
    core = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=CONTEXT,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
