"""Networks over images, each small for the tests and in full size for the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.architecture import Architecture
from benchmarks.inputs import HEADS, LAYERS, NARROW, any_images, full_images, image_mask, images

BATCH = {0: "batch"}
# Images of 800 pixels on the short side, in the shape of most photographs.
DETR_SIZE = (800, 1066)

VISION: Mapping[str, Architecture] = {
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"logits": BATCH},
        images(32, embedding_size=16, hidden_sizes=(32, 64), depths=(2, 1)),
        full_images(224, 224),
        "resnet_50",
    ),
    "mobilenet_v2": Architecture(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"logits": BATCH},
        images(64, image_size=64, depth_multiplier=0.1, finegrained_output=False),
        full_images(224, 224),
        "mobilenet_v2",
    ),
    "efficientnet": Architecture(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"logits": BATCH},
        images(32, image_size=32, width_coefficient=0.1, depth_coefficient=0.2, hidden_dim=128),
        full_images(224, 224, image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
        "efficientnet_b0",
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"logits": BATCH},
        images(32, image_size=32, num_stages=2, hidden_sizes=(16, 32), depths=(2, 1)),
        full_images(224, 224),
        "convnext_tiny",
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {"logits": BATCH},
        images(32, image_size=32, patch_size=8, **NARROW),
        full_images(224, 224),
        "vit_base_16",
    ),
    "swin": Architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {"logits": BATCH},
        images(32, image_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4),
        full_images(224, 224),
        "swin_tiny",
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"logits": {0: "batch", 2: "output_height", 3: "output_width"}},
        any_images(
            num_encoder_blocks=2,
            depths=(1, 1),
            sr_ratios=(4, 2),
            hidden_sizes=(16, 32),
            patch_sizes=(7, 3),
            strides=(4, 2),
            num_attention_heads=(1, 2),
            mlp_ratios=(2, 2),
            decoder_hidden_size=32,
        ),
        full_images(512, 512, num_labels=150),
        "segformer_b0",
    ),
    "detr": Architecture(
        "DetrForObjectDetection",
        "DetrConfig",
        {"logits": BATCH, "pred_boxes": BATCH},
        any_images(
            image_mask(("batch", "height", "width")),
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": (16, 32),
                "depths": (1, 1),
                "out_features": ["stage2"],
            },
            num_queries=6,
            d_model=32,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        ),
        full_images(
            *DETR_SIZE,
            image_mask((1, *DETR_SIZE)),
            num_labels=91,
            backbone_config={"model_type": "resnet", "out_features": ["stage4"]},
        ),
        "detr_resnet_50",
    ),
}
