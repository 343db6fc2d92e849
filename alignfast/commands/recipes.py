"""The recipes that `alignfast init` writes; the files under examples/ are these texts."""

from __future__ import annotations

_SFT = """\
# Supervised fine-tuning: alignfast sft --config sft.yaml
# Any option can be given on the command line as well: --learning_rate 1e-5. `alignfast sft --help` lists all.

model: YOUR_MODEL                  # a folder, or a name on the hub
train_dataset: YOUR_TEXTS.jsonl    # rows of {"prompt", "completion"}, {"messages"} or {"text"}; .parquet works too
# eval_dataset: HELD_OUT.jsonl     # evaluated every eval_steps and at the end
output_dir: sft_output             # model, metrics.jsonl, checkpoints, report.html

# A step is per_device_train_batch_size x gradient_accumulation_steps rows on each GPU.
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
num_train_epochs: 3
learning_rate: 2.0e-5
lr_scheduler_type: cosine
warmup_steps: 0.03                 # below 1: a share of the run
max_length: 1024                   # longer rows are cut

# Memory: less of it for about a quarter more work.
gradient_checkpointing: true
# max_tokens_per_batch: 8192       # cuts micro-batches by tokens; the result stays the same

logging_steps: 10
# eval_steps: 100
save_steps: 200
save_total_limit: 2
seed: 42
"""

_REWARD = """\
# A reward model: alignfast reward --config reward.yaml
# Any option can be given on the command line as well: --num_heads 4. `alignfast reward --help` lists all.

model: YOUR_MODEL                  # a causal language model, which gets a fresh head, or a sequence classification model
train_dataset: YOUR_PAIRS.jsonl    # rows of {"prompt", "chosen", "rejected"} or {"prompt", "ranking"}; .parquet works too
# eval_dataset: HELD_OUT.jsonl     # accuracy with its interval, calibration; every eval_steps and at the end
output_dir: reward_output          # loads in transformers' AutoModelForSequenceClassification

center_rewards_coefficient: 0.01   # holds rewards around 0
num_heads: 1                       # more are an ensemble, whose disagreement tells where the model knows little

# A step is per_device_train_batch_size x gradient_accumulation_steps rows on each GPU.
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
num_train_epochs: 1
learning_rate: 1.0e-5
lr_scheduler_type: cosine
warmup_steps: 0.1                  # below 1: a share of the run
max_length: 1024                   # longer rows are left out

# Memory: less of it for about a quarter more work.
gradient_checkpointing: true
# max_tokens_per_batch: 8192       # cuts micro-batches by tokens; the result stays the same

logging_steps: 10
# eval_steps: 100
save_steps: 200
save_total_limit: 2
seed: 42
"""

_DPO_HEAD = """\
# Direct preference optimisation: alignfast dpo --config {file}
# Any option can be given on the command line as well: --beta 0.2. `alignfast dpo --help` lists all.

model: YOUR_MODEL                  # a folder, or a name on the hub; best one that was fine-tuned already
train_dataset: YOUR_PAIRS.jsonl    # rows of {{"prompt", "chosen", "rejected"}}; .parquet works too
# eval_dataset: HELD_OUT.jsonl     # evaluated every eval_steps and at the end
output_dir: {output}
"""

_DPO_TAIL = """\

beta: 0.1                          # how much staying near the reference counts
loss_type: sigmoid                 # or ipo, hinge, robust, apo_zero, simpo, ...; [sigmoid, sft] adds likelihood

# A step is per_device_train_batch_size x gradient_accumulation_steps pairs on each GPU.
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
num_train_epochs: 1
learning_rate: {rate}
lr_scheduler_type: cosine
warmup_steps: 0.1                  # below 1: a share of the run
max_length: 1024                   # longer rows are cut

# Memory: less of it for about a quarter more work.
gradient_checkpointing: true
# max_tokens_per_batch: 8192       # cuts micro-batches by tokens; the result stays the same

logging_steps: 10
# eval_steps: 100
save_steps: 200
save_total_limit: 2
seed: 42
"""

_KTO = """\
# Kahneman-Tversky optimisation: alignfast kto --config kto.yaml
# Any option can be given on the command line as well: --beta 0.2. `alignfast kto --help` lists all.

model: YOUR_MODEL                  # a folder, or a name on the hub; best one that was fine-tuned already
train_dataset: YOUR_THUMBS.jsonl   # rows of {"prompt", "completion", "label"}, label true or false; .parquet works too
# eval_dataset: HELD_OUT.jsonl     # evaluated every eval_steps and at the end
output_dir: kto_output
precompute_ref_log_probs: true     # the reference is run once, beforehand: no second model in memory

beta: 0.1                          # how much staying near the reference counts
loss_type: kto                     # or apo_zero_unpaired
# Where one kind of thumb is rarer, weigh it up: desirable_weight x thumbs up is best 1 to 1.33 times the other side's.
desirable_weight: 1.0
undesirable_weight: 1.0

# A step is per_device_train_batch_size x gradient_accumulation_steps rows on each GPU.
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
num_train_epochs: 1
learning_rate: 1.0e-6
lr_scheduler_type: cosine
warmup_steps: 0.1                  # below 1: a share of the run
max_length: 1024                   # longer rows are cut

# Memory: less of it for about a quarter more work.
gradient_checkpointing: true
# max_tokens_per_batch: 8192       # cuts micro-batches by tokens; the result stays the same

logging_steps: 10
# eval_steps: 100
save_steps: 200
save_total_limit: 2
seed: 42
"""

_GRPO = """\
# Group relative policy optimisation: alignfast grpo --config grpo.yaml
# Any option can be given on the command line as well: --num_generations 16. `alignfast grpo --help` lists all.

model: YOUR_MODEL                  # a folder, or a name on the hub; best one that solves some of the tasks already
train_dataset: YOUR_TASKS.jsonl    # rows of {"prompt", ...}; the other columns go to the reward functions
# eval_dataset: HELD_OUT.jsonl     # answered and scored every eval_steps and at the end
reward_funcs: numeric              # the number that an answer ends with, against the column `answer`; or a reward
                                   # model's folder, or my_module:my_function
output_dir: grpo_output

num_generations: 8                 # answers to each prompt, which are compared
max_completion_length: 256
temperature: 1.0
loss_type: dapo                    # or grpo, dr_grpo, cispo, sapo
beta: 0.0                          # weight of the KL to the model as it was; 0 needs no reference
mask_truncated_completions: true   # an answer that was cut teaches nothing

# A step is per_device_train_batch_size x gradient_accumulation_steps answers on each GPU.
per_device_train_batch_size: 8
gradient_accumulation_steps: 8
max_steps: 200
learning_rate: 1.0e-6
lr_scheduler_type: constant_with_warmup
warmup_steps: 5

gradient_checkpointing: true
logging_steps: 1
# eval_steps: 25
save_steps: 50
save_total_limit: 2
seed: 42
"""

_PPO = """\
# Proximal policy optimisation: alignfast ppo --config ppo.yaml
# Any option can be given on the command line as well: --kl_coef 0.1. `alignfast ppo --help` lists all.

model: YOUR_MODEL                  # a folder, or a name on the hub; best one that was fine-tuned already
train_dataset: YOUR_PROMPTS.jsonl  # rows of {"prompt", ...}; the other columns go to the reward functions
# eval_dataset: HELD_OUT.jsonl     # answered and scored every eval_steps and at the end
reward_funcs: YOUR_REWARD_MODEL    # its folder; or numeric, exact, my_module:my_function
output_dir: ppo_output             # the policy; its critic in the folder `critic` beside it

critic: own                        # a trunk of its own; `shared` is a head on the policy's, for half the memory
# value_model: YOUR_REWARD_MODEL   # where the critic starts, of the policy's vocabulary; otherwise a copy of the policy
max_completion_length: 256
temperature: 1.0
missing_eos_penalty: 1.0           # off the score of an answer that was cut
kl_coef: 0.05                      # weight of the KL to the model as it was, in the reward
# target_kl: 6.0                   # nats of an answer, to which kl_coef is steered
num_iterations: 4                  # passes over each draw

# A minibatch is per_device_train_batch_size x gradient_accumulation_steps answers on each GPU, and a step.
# A draw is per_device_train_batch_size x steps_per_generation answers.
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
steps_per_generation: 16
max_steps: 800
learning_rate: 1.0e-6
critic_learning_rate: 1.0e-5
lr_scheduler_type: constant_with_warmup
warmup_steps: 10

gradient_checkpointing: true
logging_steps: 4
# eval_steps: 80
save_steps: 160
save_total_limit: 2
seed: 42
"""

_ONLINE = """\
# Learning from the votes on a server's answers: alignfast online --config online.yaml
# --once does one round and ends. Any option can be given on the command line as well: --min_votes 100. `alignfast
# online --help` lists all. It runs as it stands where a few people try it; many people want other values, named below.

# model: YOUR_MODEL                # the start policy; what `alignfast serve` serves already need not be named
db: sqlite:///feedback.db          # the server's; postgresql://USER@HOST/NAME where the learner is on another machine
output_dir: versions               # every version's folder; the server reads them under the same path

# A round begins with so many votes that nothing was learned from yet, a share of which is only measured with.
min_votes: 20                      # many people: 200
# max_wait: 86400                  # or after so many seconds with any
held_out: 0.2
held_out_by: prompt                # many people: user, so that no voter is on both sides

# dpo and kto learn from the votes themselves; grpo and ppo draw fresh answers, which the round's reward model scores.
method: dpo                        # many votes: grpo
# max_completion_length: 128       # tokens of a fresh answer; unless given, 256 or half of the model's positions
kl_budget: 0.1                     # nats a token that a round may go from the version that serves
policy_options:                    # of that method's trainer, by its own names: `alignfast dpo --help`
  learning_rate: 1.0e-5
  per_device_train_batch_size: 4
  num_train_epochs: 3
reward_options:
  per_device_train_batch_size: 8
# peft: {r: 16, lora_alpha: 32, target_modules: all-linear}    # train adapters alone

# What must hold before anybody meets the candidate. A refused one is kept with the reasons.
# judge: api:YOUR_JUDGE            # or package.module:function; never the reward model in use
# safety_suites: {refuses: my_module:refuses}
gate: {max_length_ratio: 1.5}      # require_significant: true refuses what nothing shows to be better

# Then a share of the users compares it with what serves; then it serves, and is watched.
canary_share: 0.0                  # many people: 0.1; 0 promotes at once
watch_seconds: 0                   # many people: 86400; what people like less is rolled back
seed: 0
"""

_REFERENCE = """\
precompute_ref_log_probs: true     # the reference is run once, beforehand: no second model in memory
"""

_LORA = """
use_peft: true                     # train adapters alone; the reference is the model without them
lora_r: 16
lora_alpha: 32
lora_target_modules: all-linear    # `alignfast merge dpo_lora_output MERGED` adds them into the weights
"""

RECIPES = {
    "sft": _SFT,
    "reward": _REWARD,
    "dpo": _DPO_HEAD.format(file="dpo.yaml", output="dpo_output")
    + _REFERENCE
    + _DPO_TAIL.format(rate="1.0e-6"),
    "dpo_lora": _DPO_HEAD.format(file="dpo_lora.yaml", output="dpo_lora_output")
    + _LORA
    + _DPO_TAIL.format(rate="1.0e-5"),
    "kto": _KTO,
    "grpo": _GRPO,
    "ppo": _PPO,
    "online": _ONLINE,
}
