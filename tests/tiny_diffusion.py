"""Save tiny Stable Diffusion, DiT and caption models with random weights; their model classes are public."""

from pathlib import Path

from tiny_parts import VISION, autoencoder, card, clip_tokenizer, seeded, text_encoder

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet(seed=4):
    """Return a denoiser for latents of 16 x 16 x 4, with text embeddings of width 32 as conditions."""
    from diffusers import UNet2DConditionModel

    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            attention_head_dim=4,
            cross_attention_dim=32,
            layers_per_block=1,
        ),
        seed,
    )


def stable_diffusion(folder=None, licence=None, prediction="epsilon"):
    """Return a tiny StableDiffusionPipeline for images of 32 x 32, also saved to `folder` if given."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    schedule = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": prediction}
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=PNDMScheduler(**BETAS, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    if folder is None:
        return pipeline
    pipeline.save_pretrained(folder)
    if licence is not None:
        card(folder, licence)
    return Path(folder)


def dit(learned=True):
    """Return a tiny DiTPipeline for images of 16 x 16 and 1000 classes."""
    from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = seeded(
        lambda: DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        6,
    )
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    respaced = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
    scheduler = DDPMScheduler(**linear, **respaced) if learned else DDIMScheduler(**linear)
    pipeline = DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def blip(folder):
    """Save a tiny BlipForConditionalGeneration and its processor in `folder`; its vocabulary has a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "a", "red", "[SEP]", "[CLS]", "[MASK]", "[UNK]", "dog", "cat", "runs", "[DEC]", "blue"]
    vocab = {w: i for i, w in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = BertTokenizerFast(tokenizer_object=backend, bos_token="[DEC]")
    text = {
        "vocab_size": 12,
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 10,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {k: v for k, v in VISION.items()}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    seeded(lambda: BlipForConditionalGeneration(config), 7).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return Path(folder)


def llava(folder):
    """Save a tiny LlavaForConditionalGeneration and its processor in `folder`; an image of 16 x 16 is four tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "<image>", "ASSISTANT:", *"a dog cat red blue runs sits".split()]
    words += [f"word{i}" for i in range(64 - len(words))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    vision = {**VISION, "image_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    seeded(lambda: LlavaForConditionalGeneration(config), 8).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return Path(folder)
