"""The call as textbooks show it, on GPT-2's architecture with fresh weights: nothing is downloaded."""

from transformers import AutoModelForCausalLM, GPT2Config

from alignfast import DPOTrainer
from alignfast.quickstart.model import make_tokenizer

dataset = [
    ("How was the soup? ", "The soup was warm and fresh.", "No idea."),
    ("How was the train? ", "The train was quiet and on time.", "Why do you ask?"),
    ("How was the museum? ", "The museum was well worth the trip.", "Go and see."),
]
# of your own: AutoTokenizer.from_pretrained
tokenizer = make_tokenizer(text for row in dataset for text in row)
config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=128)
model = AutoModelForCausalLM.from_config(config)

trainer = DPOTrainer(model=model, tokenizer=tokenizer, dataset=dataset, beta=0.1)
trainer.train()
model.save_pretrained("fine-tuned-model")
