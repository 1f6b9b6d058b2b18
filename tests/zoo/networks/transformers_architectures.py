"""Architectures of transformers, each from a tiny configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tests.zoo.entry import CLASSES, Entry, generator, labels
from tests.zoo.networks.pictures import STEPS, pictures
from torch import Tensor, nn

WORDS, LENGTH, ROWS = 50, 9, 2
_TEXT = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = _TEXT | {"num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
_IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_AUDIO = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.2, "mask_time_length": 2, "classifier_proj_size": 8,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip


def _words(mask: bool = True) -> list[tuple[Any, Any]]:
    """Return tokens with classes; every second batch has a mask."""
    g = generator()
    batches: list[tuple[Any, Any]] = []
    for i in range(STEPS):
        x = {"input_ids": torch.randint(3, WORDS, (ROWS, LENGTH), generator=g)}
        if i % 2 and mask:
            x["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3]])).long()
        batches.append((x, labels(ROWS, g)))
    return batches


def _language(mask: bool = True) -> list[tuple[Any, Any]]:
    """Return tokens that are their own labels; the network computes the loss."""
    return [({**x, "labels": x["input_ids"]}, None) for x, _ in _words(mask)]


def _images(key: str = "pixel_values", size: int = 16) -> list[tuple[Any, Any]]:
    return [({key: x}, y) for x, y in pictures(size, ROWS)]


def _speech(key: str, *shape: int) -> list[tuple[Any, Any]]:
    g = generator()
    batches = []
    for _ in range(STEPS):
        heard = torch.randn(ROWS, *shape, generator=g)
        batches.append(({key: heard, "labels": torch.randint(3, WORDS, (ROWS, 5), generator=g)}, None))
    return batches


_waves = partial(_speech, "input_values", 200)
_spectrograms = partial(_speech, "input_features", 8, 40)


def _pairs() -> list[tuple[Any, Any]]:
    return [
        ({**words, **images, "return_loss": True}, None)
        for (words, _), (images, _) in zip(_words(), _images(), strict=True)
    ]


def _series() -> list[tuple[Any, Any]]:
    g = generator()
    return [
        ({"past_values": torch.randn(ROWS, 32, 2, generator=g), "future_values": torch.randn(ROWS, 4, 2, generator=g)},
         None) for _ in range(STEPS)
    ]  # fmt: skip


def _loss(output: Any, y: Tensor | None) -> Tensor:
    """Return the loss that the network computed itself if there is no target."""
    return output.loss if y is None else F.cross_entropy(output.logits, y)


Batches = Callable[[], list[tuple[Any, Any]]]
_LABELS = {"num_labels": CLASSES}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Batches]] = {  # configuration: (class, settings, batches)
    "Bert": ("BertForSequenceClassification", _TEXT | _LABELS, _words),
    "Roberta": ("RobertaForMaskedLM", _TEXT, _language),
    "Albert": ("AlbertForSequenceClassification", _TEXT | _LABELS | {"embedding_size": 8}, _words),
    "Electra": ("ElectraForSequenceClassification", _TEXT | _LABELS | {"embedding_size": 8}, _words),
    "DistilBert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **_LABELS},
        _words,
    ),
    "DebertaV2": (
        "DebertaV2ForSequenceClassification",
        _TEXT | _LABELS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        _words,
    ),
    "ModernBert": ("ModernBertForSequenceClassification", _TEXT | _LABELS | {"cls_token_id": 1,
     "sep_token_id": 2}, _words),
    "FNet": ("FNetForSequenceClassification", _TEXT | _LABELS, partial(_words, mask=False)),
    "BigBird": ("BigBirdForSequenceClassification", _TEXT | _LABELS | {"attention_type": "original_full"}, _words),
    "Funnel": (
        "FunnelForSequenceClassification",
        {"vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, **_LABELS},
        _words,
    ),
    "XLNet": (
        "XLNetForSequenceClassification",
        {"vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, **_LABELS},
        _words,
    ),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1,
         "eos_token_id": 2},
        _language,
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", _TEXT, _language),
    "Bloom": ("BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}, _language),
    "OPT": ("OPTForCausalLM", _TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16, "layerdrop": 0.3}, _language),
    "Llama": ("LlamaForCausalLM", _DECODER, _language),
    "Gemma2": ("Gemma2ForCausalLM", _DECODER, _language),
    "Qwen3": ("Qwen3ForCausalLM", _DECODER, _language),
    "Phi3": ("Phi3ForCausalLM", _DECODER, _language),
    "Mixtral": ("MixtralForCausalLM", _DECODER | _EXPERTS | {"num_local_experts": 4}, _language),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", _DECODER | _EXPERTS | {"num_experts": 8, "moe_intermediate_size": 12},
     _language),
    "GptOss": ("GptOssForCausalLM", _DECODER | _EXPERTS | {"num_local_experts": 4}, _language),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        _TEXT | {
            "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "moe_intermediate_size": 12, "first_k_dense_replace": 1,
        },
        _language,
    ),
    "T5": ("T5ForConditionalGeneration", _T5, _language),
    "SwitchTransformers": (
        "SwitchTransformersForConditionalGeneration",
        _T5 | {"num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
         "num_sparse_decoder_layers": 1},
        _language,
    ),
    "Bart": ("BartForConditionalGeneration", _SEQ2SEQ | {"encoder_layerdrop": 0.3}, _language),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
        partial(_language, mask=False),
    ),
    "Mamba2": (
        "Mamba2ForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8,
         "n_groups": 1, "chunk_size": 4},
        partial(_language, mask=False),
    ),
    "Rwkv": (
        "RwkvForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16,
         "intermediate_size": 24},
        partial(_language, mask=False),
    ),
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        _DECODER | {"lru_width": 16, "num_hidden_layers": 3, "attention_window_size": 8},
        partial(_language, mask=False),
    ),
    "Reformer": (
        "ReformerModelWithLMHead",
        {
            "vocab_size": WORDS, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8,
            "feed_forward_size": 24, "attn_layers": ["local", "local"], "local_attn_chunk_length": 3,
            "axial_pos_embds": False, "max_position_embeddings": 40, "is_decoder": True,
        },
        _language,
    ),
    "ViT": ("ViTForImageClassification", _IMAGE | _LABELS, _images),
    "ViTMAE": (
        "ViTMAEForPreTraining",
        _IMAGE | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
                  "decoder_intermediate_size": 24},
        lambda: [(x, None) for x, _ in _images()],
    ),
    "Swinv2": (
        "Swinv2ForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
         "window_size": 2, **_LABELS},
        _images,
    ),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", **_LABELS},
        _images,
    ),
    "Segformer": (
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
         "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], **_LABELS},
        _images,
    ),
    "Wav2Vec2": ("Wav2Vec2ForCTC", _AUDIO, _waves),
    "Hubert": ("HubertForCTC", _AUDIO | {"layerdrop": 0.3}, _waves),
    "Whisper": (
        "WhisperForConditionalGeneration",
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
        _spectrograms,
    ),
    "CLIP": ("CLIPModel", {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 8}, _pairs),
    "PatchTST": (
        "PatchTSTForPrediction",
        {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
         "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "prediction_length": 4, "loss": "mse"},
        _series,
    ),
}  # fmt: skip


def _transformer(config: str, kind: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    import backforward_suite._torchvision  # noqa: F401

    return getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**settings))


def transformers() -> list[Entry]:
    """Architectures of transformers, each from a tiny configuration."""
    return [
        Entry(
            id=f"transformers {config}",
            about=kind,
            build=partial(_transformer, config, kind, settings),
            batches=batches,
            loss_of=lambda model: _loss,
        )
        for config, (kind, settings, batches) in TRANSFORMERS.items()
    ]
