"""Read the config.json files of diffusers and transformers, and refuse settings that we do not support.

Each network has a frozen dataclass of the settings that it supports. FIXED lists settings of which our code
supports one value. IGNORED lists settings without effect here. `read_config` refuses every other setting
that is switched on, because a setting that we overlook would make wrong pictures without an error.
"""

import typing

from nanoip2p.common.schema import checked, shown

# Ranges of numbers, far wider than Stable Diffusion 1.x and CLIP need. WIDTHS limits all other numbers.
# Without limits, a network from a config.json of a few bytes could need minutes or gigabytes to build
LIMITS = {
    "layers_per_block": (1, 32), "num_hidden_layers": (1, 128), "freq_shift": (0, 1),
    "vocab_size": (1, 2**20), "eos_token_id": (0, 2**20), "norm_eps": (0, 1), "layer_norm_eps": (0, 1),
    "scaling_factor": (1e-6, 1e6), "logit_scale_init_value": (-100, 100), "num_channels": (3, 3),
    "image_size": (1, 2048), "patch_size": (1, 2048), "max_position_embeddings": (1, 2048),
    "num_train_timesteps": (1, 100_000), "steps_offset": (0, 100_000), "beta_start": (1e-7, 0.999),
    "beta_end": (1e-7, 0.999)}
WIDTHS, LEVELS = (1, 2**16), 6  # most levels of a network; each level after the first halves the maps
FIXED = {
    "unet": {
        "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "dropout": 0.0, "transformer_layers_per_block": 1,
        "num_attention_heads": None, "use_linear_projection": False, "only_cross_attention": False,
        "dual_cross_attention": False, "upcast_attention": False, "attention_type": "default",
        "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
    },
    "vae": {
        "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "scheduler": {
        "timestep_type": "discrete", "interpolation_type": "linear", "lambda_min_clipped": -float("inf"),
        "original_inference_steps": 50, "timestep_scaling": 10.0,  # of LCMScheduler
    },
}
IGNORED = {
    # The second line: settings that the EMAModel of diffusers adds
    "unet": set("sample_size addition_embed_type_num_heads "
                "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split()),
    "vae": {"sample_size", "force_upcast"},  # diffusers' hints for tiling and for half precision
    # Initialisation, token ids, and the generation settings that transformers wrote before 2023
    "clip": set(
        "architectures model_type torch_dtype dtype transformers_version initializer_range "
        "initializer_factor bos_token_id pad_token_id text_config_dict vision_config_dict id2label label2id "
        "return_dict chunk_size_feed_forward tie_word_embeddings diversity_penalty "
        "encoder_no_repeat_ngram_size length_penalty max_length min_length temperature top_k top_p typical_p "
        "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty".split()),
    # Settings of the folder's own solver, which our samplers do not use; settings of features that are off
    "scheduler": set(
        "clip_sample clip_sample_range dynamic_thresholding_ratio sample_max_value flow_shift "
        "time_shift_type skip_prk_steps variance_type algorithm_type solver_order solver_type solver_p "
        "lower_order_final euler_at_final predict_x0 disable_corrector corrector_order predictor_order "
        "tau_func noise_sampler_seed".split()),
}


def read_config(cls: type, config: dict, fixed: dict, ignored: set[str]):
    """Build the dataclass `cls` from the content of a config.json. Missing fields keep their defaults.

    Ignores keys that begin with "_", and unknown keys whose value is null, false, 0 or empty. Raises
    ValueError with the key and its value for any other unknown key, for a `fixed` key with an unsupported
    value, and for a value of the wrong type or outside its range (see LIMITS).
    """
    kinds, supported = typing.get_type_hints(cls), {}
    for key, value in config.items():
        name = f"{cls.__name__}: {key}"
        if key in kinds:
            supported[key] = checked(value, kinds[key], name, *LIMITS.get(key, WIDTHS))
            if isinstance(value, list) and not 1 <= len(value) <= LEVELS:
                raise ValueError(f"{name} has {len(value)} entries, 1 to {LEVELS} are supported")
        elif key in fixed and (tuple(value) if isinstance(value, list) else value) != fixed[key]:
            raise ValueError(f"{name} = {shown(value)} is not supported, only {fixed[key]!r}")
        elif value and not (key in fixed or key in ignored or key.startswith("_")):
            raise ValueError(f"{name} = {shown(value)} is not supported: unknown in Stable Diffusion 1.x")
    return cls(**supported)
