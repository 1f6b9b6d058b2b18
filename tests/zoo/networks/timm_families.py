"""timm's families, untrained: the smallest member of each."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.entry import CLASSES, Entry
from tests.zoo.networks.pictures import pictures
from torch import nn

TIMM: dict[str, tuple[str, int, dict[str, Any], str | int]] = {  # family: (member, pixels, settings, groups)
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, "layer"),
    "byoanet": ("lambda_resnet26t", 64, {}, 8),
    "byobnet": ("test_byobnet", 32, {"img_size": 32}, "layer"),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "depth": 2, "depth_token_only": 1}, "layer"),
    "coat": ("coat_tiny", 32, {"img_size": 32, "serial_depths": [1, 1, 1, 1], "parallel_depth": 1}, 8),
    "convit": ("convit_tiny", 32, {"img_size": 32, "depth": 3, "local_up_to_layer": 2}, "layer"),
    "convmixer": ("convmixer_768_32", 32, {}, 8),
    "convnext": ("test_convnext", 32, {}, 8),
    "cpubone": ("cpubone_nano", 32, {}, 8),
    "crossvit": ("crossvit_tiny_240", 32, {"depth": [[1, 1, 0]]}, "layer"),
    "csatv2": ("csatv2", 64, {}, 8),
    "cspnet": ("cs3darknet_focus_s", 32, {}, 8),
    "cspnext": ("cspnext_tiny", 32, {}, 8),
    "davit": ("davit_tiny", 32, {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)}, 8),
    "deepseek_vit": ("deepseek_vit_412m", 112, {"img_size": 112, "embed_dim": 32, "depth": 2, "num_heads": 2}, "layer"),
    "deit": ("deit_tiny_patch16_224", 32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, "layer"),
    "densenet": ("densenet121", 32, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}, "layer"),
    "dla": ("dla46x_c", 32, {}, 8),
    "dpn": ("dpn48b", 32, {}, 8),
    "edgenext": ("edgenext_xx_small", 32, {}, 8),
    "efficientformer": ("efficientformer_l1", 224, {"img_size": 224, "depths": (1, 1, 1, 1)}, "layer"),
    "efficientformer_v2": ("efficientformerv2_s0", 32, {"img_size": 32, "depths": (1, 1, 1, 1)}, 8),
    "efficientnet": ("test_efficientnet", 32, {}, "layer"),
    "efficientvim": ("efficientvim_m1", 32, {}, 8),
    "efficientvit_mit": ("efficientvit_b0", 32, {}, 8),
    "efficientvit_msra": ("efficientvit_m0", 32, {"img_size": 32}, 8),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, "layer"),
    "fasternet": ("fasternet_t0", 32, {}, 8),
    "fastvit": ("fastvit_t8", 32, {}, 8),
    "focalnet": ("focalnet_tiny_srf", 32, {}, 8),
    "gcvit": ("gcvit_xxtiny", 32, {"img_size": 32}, 8),
    "ghostnet": ("ghostnet_050", 32, {}, 8),
    "hardcorenas": ("hardcorenas_b", 32, {}, 8),
    "hgnet": ("hgnetv2_b0", 32, {}, 8),
    "hiera": ("hiera_tiny_224", 32, {"img_size": 32, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}, "layer"),
    "hieradet_sam2": ("sam2_hiera_tiny", 32, {}, 8),
    "hrnet": ("hrnet_w18_small", 32, {}, 8),
    "iformer": ("iformer_t", 32, {}, 8),
    "inception_next": ("inception_next_atto", 32, {}, 8),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}, 4),
    "inception_v3": ("inception_v3", 96, {}, 8),
    "inception_v4": ("inception_v4", 96, {}, 4),
    "lcnetv2": ("lcnetv2_small", 64, {}, 8),
    "levit": ("levit_128s", 32, {"img_size": 32, "depth": (1, 1, 1)}, 8),
    "lowformer": ("lowformer_b0", 32, {}, 8),
    "mambaout": ("test_mambaout", 32, {}, "layer"),
    "maxxvit": ("test_coatnet", 32, {"img_size": 32}, "layer"),
    "metaformer": ("poolformerv2_s12", 32, {}, 8),
    "mlp_mixer": ("gmlp_ti16_224", 32, {"img_size": 32}, 8),
    "mobilenetv3": ("lcnet_035", 32, {}, 8),
    "mobilevit": ("mobilevit_xxs", 32, {"img_size": 32}, 8),
    "mvitv2": ("mvitv2_tiny", 32, {"img_size": 32}, 8),
    "naflexvit": (
        "naflexvit_base_patch16_parfac_gap",
        32,
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "layer",
    ),
    "nest": ("jx_nest_tiny", 32, {"img_size": 32}, 8),
    "nextvit": ("nextvit_small", 32, {}, 8),
    "nfnet": ("test_nfnet", 32, {}, "layer"),
    "pit": ("pit_ti_224", 32, {"img_size": 32}, 8),
    "pvt_v2": ("pvt_v2_b0", 32, {"depths": (1, 1, 1, 1)}, 8),
    "qwen3_vit": ("qwen3_vit_88m", 96, {"img_size": 96, "embed_dim": 32, "depth": 2, "num_heads": 2}, "layer"),
    "rdnet": ("rdnet_tiny", 32, {}, 8),
    "regnet": ("regnetx_002", 32, {}, 8),
    "repghost": ("repghostnet_050", 32, {}, 8),
    "repvit": ("repvit_m1", 32, {"img_size": 32}, 8),
    "res2net": ("res2next50", 32, {"layers": [1, 1, 1, 1]}, 8),
    "resnest": ("resnest14d", 32, {"layers": [1, 1, 1, 1]}, 8),
    "resnet": ("test_resnet", 32, {}, "layer"),
    "resnetv2": ("resnetv2_18", 32, {"layers": [1, 1, 1, 1]}, "layer"),
    "rexnet": ("rexnet_100", 32, {}, 8),
    "selecsls": ("selecsls42", 32, {}, 8),
    "senet": ("legacy_seresnet18", 32, {"layers": [1, 1, 1, 1]}, "layer"),
    "sequencer": (
        "sequencer2d_s",
        32,
        {"img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
        "layer",
    ),
    "shvit": ("shvit_s1", 32, {}, 8),
    "sknet": ("skresnet18", 32, {"layers": [1, 1, 1, 1]}, "layer"),
    "starnet": ("starnet_s050", 32, {}, 8),
    "swiftformer": ("swiftformer_xs", 32, {"img_size": 32}, 8),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        32,
        {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
        "layer",
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window16_256",
        32,
        {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
        "layer",
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_224",
        32,
        {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
        "layer",
    ),
    "tiny_vit": ("tiny_vit_5m_224", 32, {"depths": [1, 1, 1, 1]}, 8),
    "tnt": (
        "tnt_s_legacy_patch16_224",
        32,
        {"img_size": 32, "embed_dim": 32, "inner_dim": 8, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2},
        "layer",
    ),
    "tresnet": ("tresnet_m", 32, {"layers": [1, 1, 1, 1]}, "layer"),
    "twins": (
        "twins_svt_small",
        32,
        {"img_size": 32, "embed_dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        "layer",
    ),
    "vgg": ("vgg11", 240, {}, "layer"),
    "visformer": ("visformer_tiny", 32, {"img_size": 32}, 8),
    "vision_transformer": ("test_vit", 32, {"img_size": 32}, "layer"),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 32, {"img_size": 32, "depth": 2}, "layer"),
    "vision_transformer_relpos": ("test_vit_relpos", 32, {"img_size": 32}, 8),
    "vision_transformer_sam": (
        "samvit_base_patch16_224",
        32,
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": [1]},
        "layer",
    ),
    "vitamin": ("vitamin_small_224", 32, {"img_size": 32}, 8),
    "volo": ("volo_d1_224", 32, {"img_size": 32}, 8),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, {}, 8),
    "xception": ("legacy_xception", 32, {}, 8),
    "xception_aligned": ("xception41p", 32, {}, 8),
    "xcit": ("xcit_nano_12_p8_224", 32, {"img_size": 32, "depth": 2}, 8),
}


def _timm(name: str, settings: dict[str, Any]) -> nn.Module:
    import timm

    import backforward_suite._torchvision  # noqa: F401  (fixes the import of torchvision, which timm imports)

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)


def timm() -> list[Entry]:
    """Return the smallest member of each family, made narrower or shallower by its settings if it is still large."""
    return [
        Entry(
            id=f"timm {family}",
            about=f"{name} at {size} px" + "".join(f", {key}={value}" for key, value in settings.items()),
            build=partial(_timm, name, settings),
            batches=partial(pictures, size),
            optimizers=("gentle",),
            groups=groups,
        )
        for family, (name, size, settings, groups) in TIMM.items()
    ]
