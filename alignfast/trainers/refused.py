"""Options of TRL and transformers that have no counterpart here, each with the reason: refused, never ignored."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

# Reason, and the options it holds for. A reason says what to do instead.
_REASONS: dict[str, tuple[str, ...]] = {
    "batches are never padded unless you ask for it: use layout='shared', 'packed' or 'padded'": (
        "packing", "packing_strategy", "padding_free", "eval_packing", "pad_to_multiple_of",
    ),
    "rows are read, checked and tokenised when the trainer is made, in its own process": (
        "data_collator", "dataset_kwargs", "dataset_num_proc", "remove_unused_columns", "label_names",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    ),
    "map your rows to a known format before training: text, messages, prompt and completion, ...": (
        "dataset_text_field", "formatting_func",
    ),
    "rows are drawn in random order; train_sampling_strategy='sequential' keeps the file's": (
        "shuffle_dataset", "group_by_length", "length_column_name",
    ),
    "set it on the tokenizer and pass that as processing_class": ("chat_template_path", "eos_token", "pad_token"),
    "load the model yourself and pass the object": ("model_init_kwargs", "quantization_config"),
    "the head is always fused with the loss; other kernels are chosen by backend=": (
        "use_liger_kernel", "liger_kernel_config",
    ),
    "packed rows change their shape every step, so the loop compiles nothing": (
        "torch_compile", "torch_compile_backend", "torch_compile_mode",
    ),
    "counts are always those of the whole step on all ranks": ("average_tokens_across_devices",),
    "metrics are summed where they arise; logits are never stored": (
        "compute_metrics", "preprocess_logits_for_metrics", "include_for_metrics", "eval_do_concat_batches",
        "eval_accumulation_steps", "eval_use_gather_object", "batch_eval_metrics", "prediction_loss_only",
        "include_num_input_tokens_seen", "use_logits_to_keep",
    ),
    "a loss of your own goes through alignfast.kernels.linear_loss": ("compute_loss_func", "label_smoothing_factor"),
    "the optimizer is torch's AdamW, with adam_beta1, adam_beta2, adam_epsilon and weight_decay": (
        "optimizers", "optimizer_cls_and_kwargs", "optim_args", "optim_target_modules",
    ),
    "a share of the run is written as warmup_steps below 1": ("warmup_ratio",),
    "a non-finite loss is logged as it is": ("logging_nan_inf_filter",),
    "checkpointing of activations is always the non-reentrant kind": ("gradient_checkpointing_kwargs",),
    "max_tokens_per_batch bounds the memory of a micro-batch": (
        "auto_find_batch_size", "activation_offloading", "torch_empty_cache_steps",
    ),
    "sharding is fsdp=True; further settings come from `accelerate launch`": (
        "fsdp_config", "parallelism_config", "accelerator_config", "fsdp_transformer_layer_cls_to_wrap",
    ),
    "DeepSpeed is not supported: use fsdp=True": ("deepspeed",),
    "set it in torch: torch.backends.cuda.matmul, torch.use_deterministic_algorithms": ("tf32", "full_determinism"),
    "evaluation runs in the precision of training": ("bf16_full_eval", "fp16_full_eval"),
    "on SIGTERM or SIGINT a checkpoint is always written": ("enable_jit_checkpoint",),
    "a checkpoint is whole, written once by the first process": ("save_only_model", "save_on_each_node"),
    "going on from a checkpoint always restores the position in the data and the callbacks": (
        "ignore_data_skip", "restore_callback_states_from_checkpoint",
    ),
    "the model is pushed once, when training has ended": ("hub_strategy", "hub_always_push", "hub_revision"),
    "call train() or evaluate()": ("do_train", "do_eval", "do_predict"),
    "the launcher sets it": (
        "local_rank", "ddp_backend", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph",
    ),
    "the first process reports, by the logging module": (
        "log_level", "log_level_replica", "log_on_each_node", "debug", "skip_memory_metrics",
    ),
    "set it in the environment of the tracker": (
        "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    ),
    "not supported": ("neftune_noise_alpha", "use_cache"),
    "the reference stays the first one: a moving one would have to be part of every checkpoint": (
        "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    ),
    "reference log-probs are computed in batches of per_device_eval_batch_size": ("precompute_ref_batch_size",),
    "samples.jsonl in output_dir holds completions with their rewards": (
        "log_unique_prompts", "log_completions_hub_repo", "log_multimodal",
    ),
    "name a loss_type that needs no reference": ("reference_free",),
    "passes over a draw are num_iterations": ("num_ppo_epochs", "ppo_epochs"),
    "a draw is steps_per_generation micro-batches, and a step gradient_accumulation_steps of them": (
        "num_mini_batches", "num_minibatches", "mini_batch_size", "ppo_mini_batch_size", "local_rollout_forward_batch_size",
    ),
    "it is called max_completion_length": ("response_length",),
    "it is called kl_coef": ("init_kl_coef", "kl_penalty_coef"),
    "target_kl alone asks for an adaptive weight of the KL": ("adap_kl_ctrl", "kl_ctrl"),
    "it is called whiten_advantages": ("whiten_adv",),
    "pass the reward model's folder as reward_funcs": ("reward_model", "reward_model_path"),
    "max_length bounds prompt and completion together": ("max_prompt_length", "max_completion_length"),
}  # fmt: skip
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}


def refuse_unknown(owner: str, known: Iterable[str], given: Iterable[str]) -> None:
    """Raise for the first of `given` that is not `known`: with the reason where it is TRL's, else the nearest name.

    Raises:
        TypeError: an option is unknown, or known elsewhere and refused here.

    >>> refuse_unknown("DPOConfig", ["beta", "learning_rate"], ["learning_rat"])
    Traceback (most recent call last):
    TypeError: DPOConfig has no option 'learning_rat'; did you mean 'learning_rate'?
    """
    known = list(known)
    for name in given:
        if name in known:
            continue
        if name in REFUSED:
            raise TypeError(f"{owner} does not take {name!r}: {REFUSED[name]}")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
        raise TypeError(f"{owner} has no option {name!r}; {hint}")


def option_names(config_class: type) -> list[str]:
    """Names of a config's options, in the order of its fields."""
    return [field.name for field in dataclasses.fields(config_class)]
