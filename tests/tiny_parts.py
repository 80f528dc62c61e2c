"""Tiny stand-ins for pretrained models: public model classes with random weights, saved to folders."""

from pathlib import Path

import torch

D = 24
"""Joint width of the tiny CLIP; the decoder takes CLIP's image embeddings, so it has the same width."""
TEXT = {
    "vocab_size": 514,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def clip_tokenizer(folder=None):
    """Return a byte-level CLIP tokenizer without merges (514 entries), also saved to `folder` if given."""
    from transformers import CLIPTokenizer

    letters = list(byte_letters().values())
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def byte_letters():
    """Return the printable character that GPT-2 uses for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def seeded(make, seed=0):
    """Call `make()` with a fixed seed and return its result in eval mode; the global generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def clip_image_processor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def clip(folder, width=D, seed=0, licence=None):
    """Save a tiny CLIP and its processor in `folder`; with a licence, also a model card. Return the folder."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=width)
    seeded(lambda: CLIPModel(config), seed).save_pretrained(folder)
    CLIPProcessor(image_processor=clip_image_processor(), tokenizer=clip_tokenizer()).save_pretrained(folder)
    if licence is not None:
        card(folder, licence)
    return Path(folder)


def card(folder, licence):
    (Path(folder) / "README.md").write_text(f"---\nlicense: {licence}\ntags:\n- tiny\n---\n\n# Tiny\n")


def text_encoder(width=32, projected=False, seed=1):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return seeded(lambda: kind(CLIPTextConfig(**TEXT, projection_dim=width)), seed)


def image_encoder(width=D, seed=2):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return seeded(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=width)), seed)


def autoencoder(seed=3):
    """Return an autoencoder that decodes latents of 8 x 8 to images of 16 x 16."""
    from diffusers import AutoencoderKL

    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=16,
        ),
        seed,
    )


def unet(classes=None, seed=4, **options):
    """Return a denoiser for latents of 8 x 8 x 4, with text embeddings of width 32; `classes` sets class embeddings."""
    from diffusers import UNet2DConditionModel

    if classes is not None:
        options |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": classes}
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            attention_head_dim=(2, 4),
            cross_attention_dim=32,
            layers_per_block=1,
            use_linear_projection=True,
            upcast_attention=True,
            **options,
        ),
        seed,
    )


def stable_unclip(folder, width=D, licence=None):
    """Save a StableUnCLIPImg2ImgPipeline in `folder` that decodes embeddings of `width` to images of 16 x 16."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=clip_image_processor(),
        image_encoder=image_encoder(width),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=width).eval(),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=clip_tokenizer(),
        text_encoder=text_encoder(),
        unet=unet(classes=2 * width),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            set_alpha_to_one=False,
            steps_offset=1,
            clip_sample=False,
        ),
        vae=autoencoder(),
    )
    pipeline.save_pretrained(folder)
    if licence is not None:
        card(folder, licence)
    return Path(folder)


def karlo(folder, width=32):
    """Save a tiny UnCLIPImageVariationPipeline: each model in a subfolder of `folder`, as on the Hugging Face hub."""
    from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip import UnCLIPImageVariationPipeline
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    decoder = seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        ),
        5,
    )

    def upscaler(seed):
        return seeded(
            lambda: UNet2DModel(
                sample_size=32,
                in_channels=6,
                out_channels=3,
                down_block_types=("ResnetDownsampleBlock2D",) * 2,
                up_block_types=("ResnetUpsampleBlock2D",) * 2,
                block_out_channels=(32, 64),
                layers_per_block=1,
            ),
            seed,
        )

    projection = seeded(
        lambda: UnCLIPTextProjModel(clip_embeddings_dim=width, time_embed_dim=128, cross_attention_dim=32), 6
    )
    UnCLIPImageVariationPipeline(
        decoder=decoder,
        text_encoder=text_encoder(width, projected=True),
        tokenizer=clip_tokenizer(),
        text_proj=projection,
        feature_extractor=clip_image_processor(),
        image_encoder=image_encoder(width),
        super_res_first=upscaler(7),
        super_res_last=upscaler(8),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log"),
    ).save_pretrained(folder)
    return Path(folder)
