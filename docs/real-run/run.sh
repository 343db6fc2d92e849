#!/bin/sh
# The whole run, in a folder that holds smollm2/, gsm8k/ and hh_harmless/. Every stage goes on where it was stopped.
set -e
configs=$(dirname "$(realpath "$0")")
stage() { # output file, then the command that writes it
  [ -e "$1" ] && return
  shift
  echo "+ $*"
  "$@"
}
train() { # trainer, config, output folder
  if ls -d "$3"/checkpoints/step-* >/dev/null 2>&1; then resume="--resume true"; else resume=""; fi
  stage "$3/adapter_model.safetensors" alignfast "$1" --config "$configs/$2" $resume
}
stage base_perplexity.json alignfast eval --model smollm2 --dataset gsm8k/eval.jsonl --output base_perplexity.json
train sft sft.yaml sft
stage sft_perplexity.json alignfast eval --model sft --dataset gsm8k/eval.jsonl --output sft_perplexity.json
stage sft_merged/model.safetensors alignfast merge sft sft_merged
stage before_gsm8k.json alignfast eval --model sft_merged --dataset gsm8k/pairs_eval.jsonl --output before_gsm8k.json
train dpo dpo_gsm8k.yaml dpo_gsm8k
stage after_gsm8k.json alignfast eval --model dpo_gsm8k --dataset gsm8k/pairs_eval.jsonl --output after_gsm8k.json
stage before_hh.json alignfast eval --model smollm2 --dataset hh_harmless/eval.jsonl --max_length 512 --output before_hh.json
train dpo dpo_hh.yaml dpo_hh
stage after_hh.json alignfast eval --model dpo_hh --dataset hh_harmless/eval.jsonl --max_length 512 --output after_hh.json
