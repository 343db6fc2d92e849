"""Align a model on pairs of a chosen and a rejected answer: python examples/dpo.py MODEL PAIRS.jsonl"""

import sys

from alignfast import DPOConfig, DPOTrainer

model, pairs = sys.argv[1:3]
args = DPOConfig(output_dir="dpo_output", learning_rate=1e-6, beta=0.1, per_device_train_batch_size=4)
trainer = DPOTrainer(model, args=args, train_dataset=pairs)
trainer.train()
trainer.save_model("dpo_output/final")
print("model: dpo_output/final")
